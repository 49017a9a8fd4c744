"""Commands that draw on the embedded model: the demonstration, and pictures for a pushed eraser's card."""

import hashlib
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackHub, front_matter
from pico import pico_pipeline
from PIL import Image
from typer.testing import CliRunner

from spm_hub import attach, training
from spm_hub.adapters.adapter import Adapter
from spm_hub.cli import app, demo
from spm_hub.evaluation import pictures, sketchbook
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry
from spm_hub.training.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
REPO = "someone/spm-snoopy"


def spmhub(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "DrawingOptions", partial(pictures.DrawingOptions, steps=2))
    monkeypatch.setattr(sketchbook, "detection_table", partial(sketchbook.detection_table, steps=2))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub("regular", token="hf_token") as served:
        served.adopt(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield served


@pytest.mark.slow
def test_the_demonstration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned, trained, looked_at, shipped = [], [], [], Registry(ROOT).get("snoopy").load()
    train, table = training.train, sketchbook.detection_table
    short = {"steps": 2, "batch_size": 2, "x_t": {"trajectories": 2, "steps": 2, "chunks": 1}}

    def trained_for_two_steps(recipe: Recipe, **given: Any) -> Adapter:
        planned.append(recipe)
        trained.append(train(Recipe.make(target=recipe.target, **short), **given))
        return shipped  # in place of one that has hardly an effect

    def drawn(pipe: Any) -> list[bytes]:
        wanted = sketchbook.cases(("snoopy",), (), samples=1)
        return [picture.tobytes() for picture in sketchbook.paint(pipe, wanted, steps=2)]

    def looking(pipe: Any, *given: Any, **options: Any) -> list[sketchbook.DetectionRow]:
        looked_at.append(drawn(pipe))
        return table(pipe, *given, **options)

    monkeypatch.setattr(training, "train", trained_for_two_steps)
    monkeypatch.setattr(sketchbook, "detection_table", looking)
    for name, few in (("PROMPTS", ("snoopy", "a dog")), ("SUBJECTS", ("snoopy", "dog")), ("STYLES", ("picasso",))):
        monkeypatch.setattr(demo, name, few)
    done = spmhub("demo", "--out", tmp_path / "demo", "--samples", 2, "--json")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)

    assert planned == [Recipe.plan(target="snoopy")], "what `spmhub train snoopy` plans"
    assert [(one.name, one.manifest.base.family) for one in trained] == [("snoopy", "sd1")]
    assert Path(said["adapter"]) == tmp_path / "demo" / "adapters" / "snoopy.safetensors"
    assert Registry(tmp_path / "demo").get("snoopy").load().manifest.concept.target == "snoopy"
    pipe = load_pipeline("sketchbook")
    bare = drawn(pipe)
    without = table(pipe, ("snoopy", "dog"), ("picasso",), samples=2)
    with attach(pipe, [shipped]):
        assert looked_at == [bare, drawn(pipe)]
        given = table(pipe, ("snoopy", "dog"), ("picasso",), samples=2)
    assert looked_at[0] != looked_at[1]
    assert [(row["kind"], row["name"], row["without"], row["with"]) for row in said["detected"]] == [
        (one.kind, one.name, one.detected, other.detected) for one, other in zip(without, given, strict=True)
    ]
    with Image.open(said["picture"]) as grid:
        # Two rows of three pictures without and three with, enlarged to 192 pixels.
        assert grid.width > 6 * 192
        assert grid.height > 2 * 192
        assert json.loads(grid.info["spmhub"]) == {"model": "sketchbook", "adapters": ["snoopy"]}
    assert f"side by side: {said['picture']}" in done.stderr


def test_a_card_gets_pictures_that_the_base_draws(hub: LoopbackHub) -> None:
    done = spmhub("push", "snoopy", REPO, "--registry", ROOT, "--prompt", "snoopy by picasso", "-p", "a cat", "--json")
    assert done.exit_code == 0, done.stderr
    served = hub.content(REPO)
    assert sorted(name for name in served if name.startswith("images/")) == [
        f"images/{index:02d}-{condition}.png" for index in range(2) for condition in ("with", "without")
    ]
    pipe = load_pipeline("sketchbook")
    eraser = Registry(ROOT).get("snoopy").load()
    shown = pictures.show(pipe, [eraser], ["snoopy by picasso", "a cat"], pictures.DrawingOptions(seed=1))
    for index, expected in enumerate(shown):
        for condition in ("without", "with"):
            with Image.open(io.BytesIO(served[f"images/{index:02d}-{condition}.png"])) as picture:
                assert picture.tobytes() == expected.pictures[condition][0].tobytes()
                assert json.loads(picture.info["spmhub"])["prompt"] == expected.prompt
    widget = front_matter(served["README.md"].decode())["widget"]
    assert [row["text"] for row in widget] == ["snoopy by picasso"] * 2 + ["a cat"] * 2


def test_a_card_gets_the_pictures_of_a_folder(hub: LoopbackHub, tmp_path: Path) -> None:
    for condition, shade in (("without", 10), ("with", 200)):
        Image.new("RGB", (8, 8), (shade, 0, 0)).save(tmp_path / f"a-dog-{condition}.png")
    arguments = ("push", "snoopy", REPO, "--registry", ROOT, "--dry-run", "--json")
    said = json.loads(spmhub(*arguments, "--pictures", tmp_path).stdout)
    assert {file["path"]: file["sha256"] for file in said["files"] if file["path"].startswith("images/")} == {
        f"images/00-{condition}.png": hashlib.sha256((tmp_path / f"a-dog-{condition}.png").read_bytes()).hexdigest()
        for condition in ("without", "with")
    }
    assert "a dog" in said["card"]
    for more in (("--pictures", tmp_path), ("--prompt", "a dog")):
        refused = spmhub(*arguments, "--no-pictures", *more)
        assert refused.exit_code == 2
        assert "--no-pictures cannot be combined with --pictures or --prompt" in refused.stderr
    assert REPO not in hub.repositories


def test_only_the_embedded_models_are_judged_by_the_embedded_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder whose name begins as theirs draws something else."""
    monkeypatch.chdir(tmp_path)
    pico_pipeline().save_pretrained("sketchbook-of-mine")
    refused = spmhub("attack", "snoopy", "--registry", ROOT, "--model", "sketchbook-of-mine")
    assert refused.exit_code == 2
    assert "no built-in judge for pictures of sketchbook-of-mine" in refused.stderr
