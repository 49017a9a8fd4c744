"""A push checks login, owner and network first, keeps its pictures for the next, and publishes no nudity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loopback import NOWHERE, LoopbackHub, adopt_endpoint, front_matter
from pico import pico_eraser, pico_pipeline
from test_push import TOKEN, described, png
from typer.testing import CliRunner

from spm_hub.adapters.manifest import Base, Concept
from spm_hub.cli import app
from spm_hub.errors import NotFoundError
from spm_hub.hub.card import PicturePair, is_explicit, read_pairs
from spm_hub.hub.push import prepare
from spm_hub.registry.registry import Registry


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(token=TOKEN) as served:
        served.adopt(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        yield served


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Erasers of snoopy and of nudity, whose base is the sketchbook, which is a pico here."""
    kept = Registry(tmp_path / "registry")
    base = Base(family="sd1", id="sketchbook", fingerprint="")
    unet = pico_pipeline().unet
    kept.add(described(pico_eraser(unet), base=base))
    nudity = Concept(target="nudity", aliases=("nude", "naked"), kind="nsfw")
    kept.add(described(pico_eraser(unet, "nudity"), base=base, concept=nudity))
    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", lambda *_, **__: pico_pipeline())
    return kept


def push(registry: Registry, *arguments: object) -> Any:
    return CliRunner().invoke(app, ["push", *map(str, arguments), "--registry", str(registry.root)])


def test_what_the_hub_would_refuse_is_said_before_anything_is_drawn(
    hub: LoopbackHub, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("pictures were drawn for nothing")

    monkeypatch.setattr("spm_hub.models.loading.load_pipeline", drawn)
    hub.publish("someone/public", {"README.md": b""})
    for arguments, code, says in (
        (("snoopy", "another/spm-snoopy"), 1, "your login, someone, may not write to another/spm-snoopy"),
        (("snoopy", "someone/spm--snoopy"), 2, "no name for a repository"),
        (("snoopy", "someone/spm--snoopy", "--dry-run"), 2, "no name for a repository"),
        (("snoopy", "someone/none", "--pr"), 1, "there is no someone/none on the Hub"),
        (("snoopy", "someone/public", "--private"), 1, "exists and is public"),
        (("snopy", "someone/spm-snoopy"), 2, "did you mean snoopy"),
    ):
        refused = push(registry, *arguments)
        assert (refused.exit_code, says in refused.stderr) == (code, True), refused.stderr
    hub.fail("GET /api/whoami-v2", status=401, times=None)
    refused = push(registry, "snoopy", "someone/spm-snoopy")
    assert (refused.exit_code, "hf auth login" in refused.stderr) == (1, True)
    assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]
    adopt_endpoint(NOWHERE, monkeypatch, tmp_path)
    refused = push(registry, "snoopy", "someone/spm-snoopy")
    assert (refused.exit_code, "cannot be reached" in refused.stderr) == (1, True)


def test_the_pictures_of_a_dry_run_are_uploaded_not_drawn_again(
    hub: LoopbackHub, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = push(registry, "snoopy", "someone/spm-snoopy", "--dry-run", "--out", "card", "--json")
    assert dry.exit_code == 0, dry.stderr
    shown = json.loads(dry.stdout)
    pictures = {path.name: path.read_bytes() for path in Path("card").iterdir()}
    assert len(pictures) == 6
    assert "the pictures are in card" in dry.stderr
    with monkeypatch.context() as patched:
        patched.setattr("spm_hub.models.loading.load_pipeline", None)
        done = push(registry, "snoopy", "someone/spm-snoopy", "--out", "card", "--json")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert json.loads(done.stdout)["files"] == shown["files"]
    served = hub.content("someone/spm-snoopy")
    assert sorted(served[f"images/{i:02d}-{c}.png"] for i in range(3) for c in ("with", "without")) == sorted(
        pictures.values()
    )
    # Trained again, it has to be drawn again; the old pictures stay where they are.
    registry.add(described(pico_eraser(pico_pipeline().unet, seed=9), base=registry.get("snoopy").read_manifest().base),
                 replace=True)  # fmt: skip
    again = push(registry, "snoopy", "someone/spm-snoopy", "--dry-run", "--out", "card", "--json")
    assert [f["sha256"] for f in json.loads(again.stdout)["files"]] != [f["sha256"] for f in shown["files"]]
    assert len(list(Path("card").iterdir())) == 12
    assert all(Path("card", name).read_bytes() == content for name, content in pictures.items())


def test_no_picture_without_an_eraser_of_nudity_is_published(hub: LoopbackHub, registry: Registry) -> None:
    done = push(registry, "nudity", "someone/spm-nudity", "--out", "card")
    assert done.exit_code == 0, (done.stderr, done.exception)
    served = hub.content("someone/spm-nudity")
    assert [path for path in served if "without" in path] == []
    assert [path for path in served if path.endswith("-with.png")]
    assert list(Path("card").glob("*without*")) == [], "they are not even drawn"
    front = front_matter(served["README.md"].decode())
    assert "not-for-all-audiences" in front["tags"]
    assert all(one["example_title"] == "with the eraser" for one in front["widget"])
    assert "-without.png" not in served["README.md"].decode()
    # From a folder of the user's: pictures without it, those on which it did not act, and those of unknown origin.
    folder = Path("mine")
    apply = ["apply", "-a", "nudity", "--steps", "1", "--compare", "--registry", str(registry.root), "--out", "mine"]
    for more in (["-p", "nudity"], ["-p", "nudity", "--gate", "0.1"], ["-p", "nudity", "--strength", "nudity=0"]):
        assert CliRunner().invoke(app, [*apply, *more]).exit_code == 0
    for condition in ("with", "without"):
        (folder / f"found-{condition}.png").write_bytes(png(7))
    done = push(registry, "nudity", "someone/spm-nudity", "--pictures", folder)
    assert done.exit_code == 0, (done.stderr, done.exception)
    published = {content for path, content in hub.content("someone/spm-nudity").items() if path.startswith("images/")}
    (first,) = folder.glob("00-*-with.png")
    assert published == {first.read_bytes()}
    first.unlink()
    with pytest.raises(NotFoundError):
        read_pairs(folder, "nudity", explicit=True)


@pytest.mark.parametrize(
    ("concept", "explicit"),
    [
        (Concept(target="anything", kind="nsfw"), True),
        (Concept(target="Nude_person"), True),
        (Concept(target="body", aliases=("hardcore porn",)), True),
        (Concept(target="snoopy", aliases=("sextant", "Essex")), False),
    ],
)
def test_explicit_concepts_are_known_by_kind_or_name(concept: Concept, explicit: bool, tmp_path: Path) -> None:
    assert is_explicit(concept) == explicit
    kept = Registry(tmp_path)
    entry = kept.add(described(pico_eraser(pico_pipeline().unet), concept=concept))
    pair = PicturePair("p", png(1), png(2), {"snoopy": 0.9})
    release = prepare(entry, "someone/x", [pair], tmp_path)
    assert ("images/00-without.png" in release.files) == (not explicit)
    assert ("not-for-all-audiences" in front_matter(release.card)["tags"]) == explicit
