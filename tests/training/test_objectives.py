"""Every objective's losses on random tensors, against float64 transcriptions of the papers' equations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spm_hub.training import Recipe
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.batch import Batch
from spm_hub.training.methods import METHODS

Arrays = dict[str, np.ndarray]
Transcription = Callable[[Arrays, Recipe], float]


class Student:
    """A model being erased that any transcription can follow: eps(x, t, c) = x + mean(c) - t / 1000, in float64."""

    def predict(self, latents: Tensor, times: Tensor, told: Conditioning) -> Tensor:
        return latents + told.states.mean((1, 2)).view(-1, 1, 1, 1) - times.view(-1, 1, 1, 1) / 1000


def predicted(arrays: Arrays, latents: str, times: str, states: str) -> np.ndarray:
    shift = arrays[states].mean((1, 2)) - arrays[times] / 1000
    return arrays[latents] + shift[:, None, None, None]


def student(arrays: Arrays) -> np.ndarray:
    return predicted(arrays, "latents", "times", "states")


def spm(arrays: Arrays, plan: Recipe) -> float:
    eta = plan.objective.eta
    return float(np.mean((student(arrays) - (arrays["neutral"] - eta * (arrays["concept"] - arrays["neutral"]))) ** 2))


def esd(arrays: Arrays, plan: Recipe) -> float:
    eta = plan.objective.eta - (plan.objective.convention == "rewrite")
    return float(np.mean((student(arrays) - ((1 + eta) * arrays["neutral"] - eta * arrays["concept"])) ** 2))


def distilled(arrays: Arrays, plan: Recipe) -> float:
    own = predicted(arrays, "latents", "times", "neutral_states")
    goal = own if plan.objective.teacher == "student" else arrays["neutral"]
    return float(np.mean((student(arrays) - goal) ** 2))


def separated(arrays: Arrays, plan: Recipe) -> float:
    own = predicted(arrays, "latents", "times", "neutral_states")
    return float(np.mean((student(arrays) - own) * (arrays["concept"] - arrays["neutral"])))


# SPM's Eq. 4; ESD's in both conventions; Concept Ablation's model-based loss; SDD's; SepME's L_cor.
TRANSCRIPTIONS: list[tuple[str, dict[str, Any], Transcription]] = [
    ("spm", {"objective": {"eta": 0.0}}, spm),
    ("spm", {"objective": {"eta": 2.5}}, spm),
    ("esd-x", {"objective": {"eta": 3.0, "convention": "paper"}}, esd),
    ("esd-u", {"objective": {"eta": 2.0, "convention": "rewrite"}}, esd),
    ("ca", {"objective": {"teacher": "student"}}, distilled),
    ("ca", {"objective": {"teacher": "base"}}, distilled),
    ("sdd", {"objective": {"teacher": "student"}}, distilled),
    ("sepme", {}, separated),
]
# Losses of more than a model's predictions have a transcription of their own, beside what else they need.
ELSEWHERE = {"fmn": "test_baselines.py"}


@pytest.mark.parametrize(("method", "values", "transcription"), TRANSCRIPTIONS)
@pytest.mark.parametrize("anchors", [0, 3])
def test_losses_are_the_papers_in_float64(
    method: str, values: dict[str, Any], transcription: Transcription, anchors: int
) -> None:
    generator = np.random.default_rng(7)
    latents, states = (4, 4, 8, 8), (4, 5, 6)
    kept = {"anchor_latents": (anchors, *latents[1:]), "anchor_states": (anchors, *states[1:])}
    arrays: Arrays = {
        name: generator.normal(size=shape)
        for name, shape in {
            "latents": latents, "concept": latents, "neutral": latents, "states": states, "neutral_states": states,
            **kept, "anchor_predictions": kept["anchor_latents"],
        }.items()
    }  # fmt: skip
    arrays |= {"times": generator.uniform(0, 999, size=4), "anchor_times": generator.uniform(0, 999, size=anchors)}
    told = {name: torch.from_numpy(array) for name, array in arrays.items()}
    told |= {name: Conditioning(told[name]) for name in told if name.endswith("states")}
    blank = Batch(*[None] * len(Batch.__dataclass_fields__))  # type: ignore[arg-type]
    batch = replace(blank, prompts=("snoopy",) * 4, **told)
    plan = Recipe.make(target="snoopy", method=method, **values)
    chosen = METHODS[method].objective(plan)
    losses = chosen.losses(Student(), batch)  # type: ignore[arg-type]
    assert float(losses.erase) == pytest.approx(transcription(arrays, plan), rel=1e-12)
    if not anchors:
        assert float(losses.anchor) == 0.0
        return
    now = predicted(arrays, "anchor_latents", "anchor_times", "anchor_states")
    anchored = float(np.mean((now - arrays["anchor_predictions"]) ** 2))
    assert float(losses.anchor) == pytest.approx(anchored, rel=1e-12)
    whole = chosen.loss(losses.erase, losses.anchor, 12.5)
    assert float(whole) == pytest.approx(transcription(arrays, plan) + 12.5 * anchored, rel=1e-12)


def test_every_objective_has_a_transcription() -> None:
    here = {Recipe.make(target="snoopy", method=method).objective.name for method, _, _ in TRANSCRIPTIONS}
    assert here | ELSEWHERE.keys() == {one.objective_name for one in METHODS.values() if one.objective is not None}
