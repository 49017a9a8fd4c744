"""`anchoring.drawn`: anchors that an x_t of a trajectory has, of which each batch takes a few."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pico import pico_pipeline

from spm_hub.errors import RecipeError
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.forecast import rows_without_gradient
from spm_hub.training.recipe.recipe import Recipe

SIZE, STEPS = 6, 40


def recipe(**anchoring: Any) -> Recipe:
    return Recipe.make(
        target="snoopy", model="pico", steps=STEPS, batch_size=SIZE,
        x_t={"trajectories": 4, "steps": 4, "chunks": 1}, anchoring={"weight": 1.0, **anchoring},
    )  # fmt: skip


def batches(plan: Recipe) -> Iterator[tuple[TeacherModel, Batch]]:
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker((plan.target,), "character", Words.load(), ())
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker)
    source = TrajectorySource(base, plan, maker, anchors)
    for step in range(STEPS):
        yield base, source.batch(step)


@pytest.mark.parametrize(("per_target", "drawn"), [(1, 4), (2, 3), (2, 2), (2, 0), (3, 1)])
def test_a_batch_takes_as_many_anchors_as_are_asked_for(per_target: int, drawn: int) -> None:
    plan = recipe(per_target=per_target, drawn=drawn)
    _, batch = next(batches(plan))
    of_the_empty_prompt = SIZE // 4
    assert len(batch.latents) == SIZE
    assert len(batch.anchor_latents) == per_target * SIZE + of_the_empty_prompt


def test_kept_predictions_are_the_bases_own_of_the_anchors_taken() -> None:
    """The base predicts every row of a batch again, from its latents, its time and its states alone."""
    for base, batch in list(batches(recipe(per_target=2, drawn=4)))[:3]:
        again = base.predict(batch.anchor_latents, batch.anchor_times, batch.anchor_states)
        torch.testing.assert_close(again, batch.anchor_predictions, rtol=1e-4, atol=1e-4)


def test_more_anchors_than_a_batch_takes_are_seen_over_the_steps() -> None:
    def different(**anchoring: Any) -> int:
        states = [batch.anchor_states.states[:SIZE].flatten(1) for _, batch in batches(recipe(**anchoring))]
        return len(torch.unique(torch.cat(states).round(decimals=4), dim=0))

    # One anchor leads each of four trajectories, and without others it is that of all their steps.
    assert different(per_target=1, drawn=0) <= 4
    assert different(per_target=1, drawn=4) > 16


def test_a_forecast_counts_the_rows_of_all_that_are_drawn() -> None:
    few, many = (rows_without_gradient(recipe(per_target=1, drawn=drawn)) for drawn in (0, 5))
    assert many - few == 4 * 4 * (5 - 1)


def test_a_manifest_of_a_version_without_drawn_has_none() -> None:
    kept = recipe(per_target=1).model_dump(mode="json")
    assert kept["anchoring"]["drawn"] == 4, "the preset of spm"
    del kept["anchoring"]["drawn"]
    assert Recipe.make(**kept).anchoring.drawn == 0


def test_drawn_is_refused_where_no_trajectory_would_read_it() -> None:
    student = {"source": "student", "guidance": [3.0]}
    assert Recipe.make(target="snoopy", x_t=student).anchoring.per_target == 1, "the preset's own may stay"
    with pytest.raises(RecipeError, match=r"anchoring\.drawn 7 belongs to x_t.source 'trajectory'"):
        Recipe.make(target="snoopy", x_t=student, anchoring={"drawn": 7})
