"""spmhub eval: its counts, its refusals and the numbers it keeps in a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.increments import LowRank
from spm_hub.attachment import is_attached
from spm_hub.cli.app import app
from spm_hub.evaluation.sketchbook import DetectionCase
from spm_hub.registry.registry import Registry
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.probe import Reading
from spm_hub.sketchbook.world import STYLE_NAMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    for folder, suffix in (("adapters", "safetensors"), ("manifests", "json")):
        (tmp_path / folder).mkdir()
        for name in ("snoopy", "mickey"):
            shutil.copy(ROOT / folder / f"{name}.{suffix}", tmp_path / folder)
    return tmp_path


@pytest.fixture(autouse=True)
def recognisable_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Draw pictures whose red says whether erasers are attached, and whose green is the index of the case's name."""
    names = [*SUBJECTS, *STYLE_NAMES]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))  # for these pictures alone

    def paint(
        pipe: Any, wanted: Sequence[DetectionCase], *, steps: int, guidance_scale: float, progress: Any
    ) -> list[Any]:
        assert (steps, guidance_scale) == (3, 7.5)
        return [Image.new("RGB", (8, 8), (255 * is_attached(pipe), names.index(case.name), 0)) for case in wanted]

    def read(self: object, pictures: Sequence[Image.Image]) -> list[Reading]:
        """Read every picture correctly, but with erasers every other cat wrongly, and every snoopy."""
        found = []
        for at, picture in enumerate(pictures):
            red, green, _ = np.asarray(picture)[0, 0].tolist()
            name = names[green]
            gone = red and (name == "snoopy" or (name == "cat" and at % 2))
            found.append(Reading("tree", "none") if gone else Reading(name, name))
        return found

    monkeypatch.setattr("spm_hub.evaluation.sketchbook.paint", paint)
    monkeypatch.setattr("spm_hub.sketchbook.probe.Probe.read", read)


def run(*given: str) -> Any:
    return CliRunner().invoke(app, ["eval", *given, "--steps", "3"])


def test_the_table_tells_what_was_taken_away_and_what_else_went(registry: Path) -> None:
    done = run("snoopy", "--registry", str(registry), "--samples", "4", "--json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    first, second, *rest = printed["rows"]
    assert first == {
        "kind": "subject", "name": "snoopy", "erased": True, "without": 1.0, "with": 0.0, "change_points": -100.0,
    }  # fmt: skip
    assert (second["name"], second["erased"], second["change_points"]) == ("cat", False, -50.0)
    assert len(rest) == len(SUBJECTS) + len(STYLE_NAMES) - 2
    assert not any(row["change_points"] or row["erased"] for row in rest)
    assert printed["others_worst_points"] == -50.0
    assert printed["others_mean_points"] == round(-50 / (len(rest) + 1), 2)


def test_numbers_are_kept_where_they_are_asked_for_and_only_there(registry: Path) -> None:
    def cats() -> list[tuple[float, float | None, int]]:
        entries = Registry(registry).get("snoopy").read_manifest().evaluation
        return [(one.value, one.reference, one.samples) for one in entries if one.subject == "cat"]

    before = cats()
    assert run("snoopy", "--registry", str(registry), "--samples", "2").exit_code == 0
    assert cats() == before
    # Those of the repository rest on more pictures.
    refused = run("snoopy", "--registry", str(registry), "--samples", "2", "--record")
    assert (refused.exit_code, "that rest on more (50 samples" in refused.stderr) == (1, True)
    assert cats() == before
    arguments = ("snoopy", "--registry", str(registry), "--samples", "2", "--record", "--force")
    assert run(*arguments).exit_code == 0
    assert cats() == [(0.5, 1.0, 2)]


def test_a_record_says_how_it_was_made_and_is_not_spoilt(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded() -> Any:
        (found,) = {
            (one.samples, one.steps, one.guidance, one.gate, one.version, one.date)
            for one in Registry(registry).get("snoopy").read_manifest().evaluation
            if one.base == "sketchbook"
        }
        return found

    asked = ("snoopy", "--registry", str(registry), "--record", "--samples")
    began = datetime.now(UTC).replace(microsecond=0)
    assert run(*asked, "60", "--force").exit_code == 0, "those of the repository have more steps"
    samples, steps, guidance, gate, version, date = recorded()
    assert (samples, steps, guidance, gate, version) == (60, 3, 7.5, "evidence", metadata.version("spm-hub"))
    assert began <= date <= datetime.now(UTC)
    shown = CliRunner().invoke(app, ["show", "snoopy", "--registry", str(registry)]).stdout
    others = -50 / (len(SUBJECTS) + len(STYLE_NAMES) - 1)
    assert f"snoopy 100 % -> 0 %, others {others:+.1f} (worst: cat -50.0); gate evidence" in shown
    assert f"(on sketchbook, 60 pictures each, 3 steps, guidance 7.5, {date:%Y-%m-%d})" in shown

    with monkeypatch.context() as patched:
        patched.setattr("spm_hub.evaluation.effect.measure", None)  # refused before anything is drawn
        for fewer in (("59",), ("60", "--steps", "2")):
            refused = CliRunner().invoke(app, ["eval", *asked[:3], "--steps", "3", "--record", "--samples", *fewer])
            assert refused.exit_code == 1
            assert "--samples 60 --steps 3, or --force" in refused.stderr
        alone = run("snoopy", "--registry", str(registry), "--force")
        assert (alone.exit_code, "--force is for several erasers, or for --record" in alone.stderr) == (2, True)
    assert recorded()[:2] == (60, 3)
    assert run(*asked, "60").exit_code == 0, "as many replace as many"


def test_a_judge_from_the_working_folder_counts_the_concepts_alone(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (registry / "mine").mkdir()
    (registry / "mine" / "judges.py").write_text(
        "def green(pictures):\n    return [picture.getpixel((0, 0))[0] == 0 for picture in pictures]\n"
    )
    monkeypatch.chdir(registry)
    done = run("snoopy", "mickey", "--judge", "mine.judges:green", "--samples", "3", "--json", "--registry", ".")
    assert done.exit_code == 0, done.output
    assert [(row["name"], row["without"], row["with"]) for row in json.loads(done.stdout)["rows"]] == [
        ("snoopy", 1.0, 0.0), ("mickey", 1.0, 0.0),
    ]  # fmt: skip


def test_erasers_that_undo_each_other_are_refused_before_a_picture_is_drawn(
    registry: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    snoopy = load_file(registry / "adapters/snoopy.safetensors")
    negative = {path: LowRank(one.down, -one.up) for path, one in snoopy.increments.items() if isinstance(one, LowRank)}
    manifest = snoopy.manifest.model_copy(update={"name": "hands"})
    Registry(registry).add(Adapter(manifest, snoopy.with_increments(negative).increments))
    both, out = ("snoopy", "hands", "--registry", str(registry)), str(tmp_path / "run")
    forced = run(*both, "--samples", "1", "--force", "--json")
    assert forced.exit_code == 0, forced.output
    assert "undoes" in " ".join(forced.stderr.split())
    assert json.loads(forced.stdout)["erasers"] == ["snoopy", "hands"]

    def never(*given: object, **also: object) -> None:
        raise AssertionError("a picture is drawn")

    monkeypatch.setattr("spm_hub.evaluation.sketchbook.paint", never)
    for way in ((), ("--protocol", "spm-objects", "--quick", "--out", out)):
        refused = run(*both, *way)
        assert refused.exit_code == 2, refused.output
        assert "undoes" in " ".join(refused.stderr.split())
        assert "--force" in refused.stderr
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["snoopy", "mickey", "--record"], "--record is for one eraser, but 2 are named"),
        (["snoopy", "--record", "--strength", "snoopy=2"], "--strength would change the numbers"),
        (["snoopy", "--model", "somebody/sd"], "there is no built-in judge for pictures of somebody/sd"),
        (["snoopy", "--judge", "nowhere.at:all"], "nowhere"),
        (["snoopy", "--judge", ".relative:name"], "relative"),
        (["snopy"], "did you mean"),
        (["snoopy", "--guidance", "nan"], "guidance must be a finite number"),
        (["snoopy", "--seed", "-1"], "seed must be at least 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(registry: Path, given: list[str], words: str) -> None:
    done = run(*given, "--registry", str(registry))
    assert done.exit_code in (1, 2)
    assert words in " ".join(done.stderr.split())
