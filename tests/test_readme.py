"""No measured number of these pages is typed by hand: their tables come from the committed results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import spm_hub
from spm_hub.models.loading import load_pipeline

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_WORDS = 132, 1800


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md", "docs/benchmarks.md"])
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert imported("tables").render(page, text) == text


def test_every_result_has_a_table() -> None:
    results = {path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json")}
    assert results == set(imported("tables").SECTIONS)


def test_the_readme_is_two_screens() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


def test_the_gammas_in_the_picture_are_those_of_the_shipped_erasers() -> None:
    picture = imported("readme_picture")
    with Image.open(picture.PICTURE) as image:
        stated = json.loads(image.info["spmhub"])["gates"]  # type: ignore[attr-defined]
    assert set(stated) == {prompt for prompt, _ in picture.PROMPTS}
    with spm_hub.attach(load_pipeline("sketchbook"), list(picture.ERASERS), registry=ROOT) as erasers:
        for prompt, gammas in stated.items():
            assert erasers.gates(prompt) == pytest.approx(gammas, abs=1e-3)
