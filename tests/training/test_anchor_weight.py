"""Lambda follows the erasure: down while the concept is still there, up once it is gone, and never without a goal."""

import pytest
import torch

from spm_hub.training import Recipe
from spm_hub.training.loop.anchor_weight import AnchorWeight
from spm_hub.training.methods.spm import SPM

STEPS = 100


def steered(left, *, steps=STEPS, **anchoring):
    steering = AnchorWeight(Recipe.make(target="snoopy", steps=STEPS, anchoring={"weight": 40.0, **anchoring}))
    for step in range(steps):
        steering.note(step, left * 3.0, 3.0, SPM(1.0))
    return steering


def test_nothing_moves_before_a_quarter_of_the_steps_or_without_a_goal():
    assert steered(1.0, steps=STEPS // 4).weight == 40.0
    assert steered(1.0, reach=None).weight == 40.0


@pytest.mark.parametrize("reach", [0.8, 0.9, 1.0])
def test_lambda_rests_where_the_concept_is_the_wanted_share_of_the_way(reach):
    # Of a way of length 1 + eta in units of the distance to the surrogate, `reach` is gone; the loss is its square.
    left = ((2 - reach) / 2) ** 2
    assert steered(left, reach=reach).weight == pytest.approx(40.0)
    assert steered(1.1 * left, reach=reach).weight < 40.0 < steered(0.9 * left, reach=reach).weight


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 1.0, 100.0])
def test_lambda_stays_in_its_range(left):
    assert 5.0 <= steered(left).weight <= 320.0
    assert steered(left, weight=0.0).weight == 0.0


def test_a_resumed_run_steers_on_exactly():
    first = steered(0.5, steps=60)
    again = AnchorWeight(Recipe.make(target="snoopy", steps=STEPS, anchoring={"weight": 40.0}))
    again.load(first.state())
    for steering in (first, again):
        steering.note(60, 1.0, 3.0, SPM(1.0))
    assert torch.equal(first.state(), again.state())
    assert first.weight != 40.0
