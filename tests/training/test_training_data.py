"""What a training draws and how fast it goes: anchors of every source, the learning rate's schedules."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pico import pico_pipeline

from spm_hub.training import Recipe
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.data.student import StudentSource
from spm_hub.training.loop.prediction_run import PredictionRun
from spm_hub.training.loop.run import Task
from spm_hub.training.methods import METHODS
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.trainable import Trainable

SMALL: dict[str, Any] = {"target": "snoopy", "steps": 4, "batch_size": 3, "x_t": {"source": "student", "steps": 3}}


def drawn(count: int, **values: Any) -> tuple[TeacherModel, torch.Tensor]:
    plan = Recipe.make(**SMALL, **values)
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    source = AnchorSource(base, plan.anchoring, plan.target, maker, plan.surrogate)
    return base, source.draw(count, generator_for(0, 9, 0)).states


def test_given_anchors_are_the_given_prompts_and_all_of_them() -> None:
    given = ["a cat", "two dogs", "mickey"]
    base, states = drawn(60, anchoring={"source": "given", "prompts": given})
    wanted = [base.encode([prompt]).states[0] for prompt in given]
    found = [[torch.equal(row, one) for one in wanted] for row in states]
    assert all(any(row) for row in found)
    assert all(any(column) for column in zip(*found, strict=True))


def test_gaussian_anchors_have_the_released_codes_lengths_and_no_favourite_direction() -> None:
    base, states = drawn(200, anchoring={"source": "gaussian"})
    lengths = states.flatten(1).norm(dim=1) / base.encode(["snoopy"]).states.norm()
    assert ((lengths >= 0.8 - 1e-5) & (lengths <= 1.2 + 1e-5)).all()
    assert lengths.min() < 0.83
    assert lengths.max() > 1.17
    rows = torch.nn.functional.normalize(states.flatten(1), dim=1)
    cosines = (rows @ rows.T)[~torch.eye(len(rows), dtype=torch.bool)]
    assert abs(float(cosines.mean())) < 0.01


def test_surrogate_anchors_are_the_concepts_sentences_without_the_concept() -> None:
    _, states = drawn(50, surrogate="dog", anchoring={"source": "surrogate"})
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), "other", Words.load(), vocabulary_words(base.pipe.tokenizer))
    generator = generator_for(0, 9, 0)
    sentences = [maker.target(generator) for _ in range(50)]
    assert all("snoopy" in sentence for sentence in sentences)
    expected = base.encode([sentence.replace("snoopy", "dog") for sentence in sentences]).states
    assert torch.equal(states, expected)


def test_concept_ablations_prior_asks_each_picture_for_its_own_sentence() -> None:
    plan = Recipe.make(
        **{**SMALL, "x_t": {**SMALL["x_t"], "driver": "surrogate", "guidance": [3.0]}}, method="ca", surrogate="dog",
        anchoring={"per_target": 2},
    )  # fmt: skip
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker, plan.surrogate)
    injection: Trainable = TrainableLowRank(base.denoiser, 1, generator_for(0, 2, 0))
    batch = StudentSource(base, plan, maker, anchors, injection).batch(0)
    injection.remove()
    own = base.encode([prompt.replace("snoopy", "dog") for prompt in batch.prompts for _ in range(2)]).states
    assert torch.equal(batch.anchor_states.states, own)
    assert torch.equal(batch.anchor_latents, batch.latents.repeat_interleave(2, dim=0))


@pytest.mark.parametrize(
    ("schedule", "middle", "three_quarters", "last"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("cosine", 0.5, 0.5 * (1 + math.cos(0.75 * math.pi)), 0.5 * (1 + math.cos(0.99 * math.pi))),
        # Two cycles: the middle is a new beginning, three quarters the middle of the second.
        ("cosine_restarts", 1.0, 0.5, 0.5 * (1 + math.cos(0.98 * math.pi))),
    ],
)
def test_learning_rates_rise_and_fall_as_their_schedules_say(
    schedule: str, middle: float, three_quarters: float, last: float
) -> None:
    cycles = {"cycles": 2} if schedule == "cosine_restarts" else {}
    plan = Recipe.make(target="snoopy", steps=110, optimiser={"schedule": schedule, "warmup": 10, **cycles})
    found = [plan.learning_rate(step) for step in (0, 9, 10, 60, 85, 109)]
    assert found == pytest.approx([1 / 11, 10 / 11, 1.0, middle, three_quarters, last], abs=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_first_step_moves_every_number_by_the_rate_of_its_layer(scaled: bool) -> None:
    """AdamW's first step is lr * g / (|g| + eps): the rate itself, wherever there is a gradient."""
    plan = Recipe.make(**SMALL, optimiser={"lr": 1e-3, "scale_lr": scaled, "warmup": 0}, objective={"eta": 1.0})
    base = TeacherModel(pico_pipeline())
    base.denoiser.requires_grad_(False)
    modules = {path: m for path, m in base.denoiser.named_modules() if path.endswith(("to_q", "to_k", "ff.net.2"))}
    run = PredictionRun(Task(plan, base, modules, METHODS[plan.method].objective(plan)))
    assert isinstance(run.trainable, TrainableLowRank)
    before = {
        path: (run.trainable.downs[path].detach().clone(), run.trainable.ups[path].detach().clone()) for path in modules
    }
    run.differentiate(
        torch.stack([p.sum() for p in (*run.trainable.downs.values(), *run.trainable.ups.values())]).sum()
    )
    run.update(0)
    for path, (down, up) in before.items():
        fan_in = down[0].numel()
        wanted = 1e-3 * (128 / fan_in if scaled else 1.0)
        np.testing.assert_allclose((down - run.trainable.downs[path].detach()).numpy(), wanted, rtol=1e-3)
        np.testing.assert_allclose((up - run.trainable.ups[path].detach()).numpy(), 1e-3, rtol=1e-3)
    run.trainable.remove()


def test_sepme_minimises_its_loss_and_no_share_of_it() -> None:
    """At the paper's beta gradients lie below Adam's epsilon: a loss divided by anything would make other steps."""
    plan = Recipe.make(**{**SMALL, "x_t": {"source": "q_sample", "steps": 3, "trajectories": 2}}, method="sepme")
    base = TeacherModel(pico_pipeline())
    base.denoiser.requires_grad_(False)
    modules = {path: m for path, m in base.denoiser.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))}
    run = PredictionRun(Task(plan, base, modules, METHODS[plan.method].objective(plan)))
    losses = run.losses(0)
    assert float(run.total(0, losses).detach()) == pytest.approx(float(losses.erase.detach()), rel=1e-6)
    assert run.note(0, losses)["erase"] == pytest.approx(float((losses.erase / losses.distance).detach()), rel=1e-6)
    run.trainable.remove()
