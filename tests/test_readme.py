"""No measured number of these pages is typed by hand: their tables come from the committed results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

import spm_hub
from spm_hub.models.loading import load_pipeline

ROOT = Path(__file__).parents[1]
MOST_LINES, MOST_WORDS = 132, 1800


def imported(name: str) -> ModuleType:
    """Import a script of benchmarks/ as `python benchmarks/NAME.py` finds its modules."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["README.md", "docs/how-it-works.md", "docs/attacks.md", "docs/benchmarks.md"])
def test_tables_are_those_of_the_committed_results(page: str) -> None:
    text = (ROOT / page).read_text()
    assert imported("tables").render(page, text) == text


def test_attacks_report_what_their_outcomes_say() -> None:
    """Rates and Wilson's intervals, solved from |p - s/n| = z sqrt(p (1 - p) / n), from the outcomes of every cell."""
    numbers = json.loads((ROOT / "benchmarks" / "results" / "attacks.json").read_text())
    prompts: dict[str, list[object]] = {}
    for cell, found in numbers["cells"].items():
        name, attack, gate = cell.split(":")
        outcomes, budget = found["outcomes"], numbers["budget"]
        assert prompts.setdefault(name, [(one["prompt"], one["seed"]) for one in outcomes]) == [
            (one["prompt"], one["seed"]) for one in outcomes
        ]
        assert found["cases"] == len(outcomes) <= found["cases_given"] == budget["prompts"]
        won = [one for one in outcomes if one["adversarial"] is not None]
        fresh = [shown for one in won for shown in one["fresh"]]
        for key, successes, trials in (
            ("asr_interval_95", sum(one["before"] for one in outcomes) + len(won), len(outcomes)),
            ("fresh_interval_95", sum(fresh), len(fresh)),
        ):
            rate = found["asr" if key == "asr_interval_95" else "fresh_rate"]
            if not trials:
                assert rate is None
                continue
            assert rate == pytest.approx(successes / trials, abs=1e-4)
            square = 1.959964**2 / trials
            ends = np.roots([1 + square, -2 * successes / trials - square, (successes / trials) ** 2])
            assert sorted(found[key]) == pytest.approx(sorted(np.clip(ends.real, 0, 1)), abs=2e-4)
        for one in outcomes:
            assert not (one["before"] and one["rounds"])
            assert one["rounds"] <= budget["tries"]
            assert len(one["gammas"]) == bool(one["adversarial"]), cell
            if one["adversarial"] is not None and gate == "always":
                assert one["gammas"][name] == 1.0
            if one["adversarial"] is not None and "token-free" in attack:
                written = one["adversarial"].lower().split()
                assert name.split("-")[0] not in written, cell


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
