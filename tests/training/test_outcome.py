"""How a training says how it goes: its phases, the share of the way that is gone, the verdict, and the manifest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pico import pico_pipeline

from spm_hub.adapters.manifest import Base, Concept, IncrementInfo, Manifest, Training
from spm_hub.io import progress
from spm_hub.io.progress import Progress, show_phases
from spm_hub.training import train
from spm_hub.training.methods.ca import ConceptAblation
from spm_hub.training.methods.esd import ESD
from spm_hub.training.methods.sdd import SDD
from spm_hub.training.methods.sepme import SepME
from spm_hub.training.methods.spm import SPM
from spm_hub.training.objective import Objective
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.verdict import is_short, verdict, way

SMALL: dict[str, Any] = {"target": "snoopy", "steps": 4, "batch_size": 2}
X_T: dict[str, Any] = {"steps": 2, "trajectories": 2, "chunks": 2}
OBJECTIVES = [
    SPM(0.0),
    SPM(1.0),
    SPM(2.5),
    ESD(2.0, "rewrite"),
    ESD(1.0),
    ConceptAblation("base"),
    SDD("base"),
    SepME(),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@given(gone=st.floats(-0.5, 1.0), seed=st.integers(0, 5))
def test_reached_is_how_far_a_prediction_went_from_the_concepts_to_the_surrogates(
    objective: Objective, gone: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    concept, neutral = torch.randn(2, 3, 4, 5, 5, generator=random, dtype=torch.float64)
    prediction = concept + gone * (neutral - concept)
    left = objective.erase(prediction, concept, neutral) / objective.erase(concept, concept, neutral)
    assert objective.reached(float(left)) == pytest.approx(gone, abs=1e-6)


class Written:
    """A reporter that writes down the phases and how far each came."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []

    def say(self, text: str) -> None: ...

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
            self.phases.append((label, step, total))

        yield move


@pytest.mark.parametrize(
    ("recipe", "label"),
    [
        ({"x_t": X_T}, "drawing trajectories to learn from"),
        ({"x_t": {**X_T, "source": "q_sample"}}, "drawing pictures to learn from"),
        ({"method": "sepme", "protection": {"prompts": ["a dog"]}, "x_t": X_T}, "protecting prompts"),
        ({"method": "sepme", "x_t": X_T}, "measuring what protected prompts are left with"),
        (
            {"method": "minimalist", "x_t": {"steps": 2}, "masks": {"prompts": 9}},
            "drawing pictures to learn from",
        ),
        ({"method": "uce", "closed_form": {"sentences": 3}}, "encoding sentences about snoopy"),
        ({"method": "instant"}, "encoding sentences about everything else"),
        ({"method": "instant"}, "computing the closed form"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_phase_that_takes_long_is_shown(
    recipe: dict[str, Any], label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(step=2.0)  # each look at it is two seconds later
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    written = Written()
    few = {} if recipe.get("method") in ("uce", "instant") else {"steps": 4, "batch_size": 2}
    with show_phases(written):
        train(Recipe.make(target="snoopy", **few, **recipe), pipe=pico_pipeline(text_width=64))
    seen = [(step, total) for each, step, total in written.phases if each == label]
    assert seen, written.phases
    assert all(1 <= step <= total for step, total in seen)
    assert seen[-1][0] == seen[-1][1], "it is shown to its end"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"x_t": X_T}, {"steps": 4, "planned": 4, "ended": "all steps", "goal": 0.85}),
        (
            {"method": "esd-x", "x_t": X_T, "anchoring": {"reach": None}, "stop": {"reach": None}},
            {"steps": 4, "planned": 4, "ended": "all steps", "goal": None},
        ),
        ({"method": "fmn", "x_t": X_T}, {"steps": 4, "planned": 4, "ended": "all steps", "goal": None}),
        (
            {"x_t": X_T, "stop": {"below": 1e9, "after": 1}},
            {"steps": 3, "planned": 4, "ended": "early stop"},
        ),
        (
            {"method": "minimalist", "x_t": {"steps": 2}, "masks": {"prompts": 2}},
            {"steps": 4, "planned": 4, "ended": "all steps", "goal": None},
        ),
        ({"method": "uce"}, {"steps": 0, "planned": 0, "ended": "closed form", "goal": None, "reached": None}),
        ({"method": "instant"}, {"steps": 0, "planned": 0, "ended": "closed form", "goal": None, "reached": None}),
    ],
    ids=lambda value: str(value.get("method", "spm") if "ended" not in value else value["ended"]),
)
def test_what_was_reached_stands_in_the_manifest(recipe: dict[str, Any], expected: dict[str, Any]) -> None:
    few = {} if recipe.get("method") in ("uce", "instant") else {"steps": 4, "batch_size": 2}
    shown: list[dict[str, float]] = []
    adapter = train(
        Recipe.make(target="snoopy", **few, **recipe), pipe=pico_pipeline(),
        progress=lambda step, total, figures: shown.append(figures),
    )  # fmt: skip
    training = adapter.manifest.training
    assert training is not None
    assert {key: value for key, value in training.model_dump().items() if key in expected} == expected
    if "reached" not in expected:
        assert training.reached == shown[-1]["reached"]
    inside = Manifest.from_json(adapter.manifest.to_embedded_json())
    assert inside.training == training


def of(training: Training | None) -> Manifest:
    return Manifest(
        name="snoopy", concept=Concept(target="snoopy"), base=Base(family="sd1", id="", fingerprint=""), recipe={},
        increment=IncrementInfo(kind="dense", dtype="float32", modules=("a",)), training=training,
    )  # fmt: skip


def ended(steps: int, planned: int, how: str, reached: float | None = None, goal: float | None = None) -> Training:
    return Training.model_validate({"steps": steps, "planned": planned, "ended": how, "reached": reached, "goal": goal})


VERDICTS = [
    (ended(300, 300, "all steps", 0.934, 0.9), "is trained: 93 % of the way, goal 90 %", False),
    (ended(300, 300, "all steps", 0.871, 0.9), "is trained: 87 % of the way, goal 90 %", False),
    (
        ended(40, 40, "all steps", 0.61, 0.9),
        "is not erased enough after 40 steps: 61 % of the way, goal 90 %",
        True,
    ),
    (ended(40, 40, "all steps", -0.2), "is not erased enough after 40 steps: 0 % of the way", True),
    (ended(300, 300, "all steps", 1.3), "is trained: 130 % of the way", False),
    (ended(300, 300, "all steps", 0.42), "is trained, but only 42 % of the way", False),
    (
        ended(20, 300, "callback", 0.95, 0.9),
        "is not fully trained: a callback ended it at step 20 of 300, 95 % of the way, goal 90 %",
        False,
    ),
    (ended(0, 0, "closed form"), "is computed", False),
]


@pytest.mark.parametrize(("training", "says", "short"), VERDICTS)
def test_the_verdict(training: Training, says: str, short: bool) -> None:
    assert verdict(of(training)) == f"snoopy {says}"
    assert is_short(training) == short


def test_without_a_figure_there_is_none() -> None:
    assert way({"erase": 0.4, "anchor": 0.1}) == ""


def test_an_older_manifest_has_none_and_its_embedded_copy_stays_as_it_was() -> None:
    assert '"training"' not in of(None).to_embedded_json()
    assert Manifest.from_json(of(None).to_embedded_json()).training is None


def test_prompts_that_an_adversary_found_have_no_goal() -> None:
    """The adversary begins in the middle: before, the concept's own prompts have one."""
    recipe = Recipe.make(
        target="snoopy", method="race-spm", steps=6, batch_size=2, x_t=X_T, adversary={"steps": 1, "begins": 0.5}
    )
    goals: list[float | None] = []
    eraser = train(
        recipe,
        pipe=pico_pipeline(text_width=64),
        progress=lambda step, total, figures: goals.append(figures.get("goal")),
    )
    assert goals == [0.9, 0.9, 0.9, None, None, None]
    assert eraser.manifest.training is not None
    assert eraser.manifest.training.goal is None
    assert eraser.manifest.training.reached is not None
