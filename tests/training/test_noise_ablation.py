"""Concept Ablation's noise-based variant, against its equation in float64 and numbers of its authors' code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from pico import pico_pipeline

from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.q_sample import QSampleSource, add_noise, true_prediction
from spm_hub.training.methods import METHODS
from spm_hub.training.trainable.dense import TrainableDense
from spm_hub.training.trainable.module_selection import select_modules

X_T = {"source": "q_sample", "driver": "surrogate", "steps": 5, "trajectories": 3, "chunks": 1}
NOISE = {"method": "ca", "objective": {"goal": "noise"}, "x_t": X_T, "steps": 4, "batch_size": 4}


def recipe(**values: Any) -> Recipe:
    return Recipe.make(**{"target": "snoopy", **NOISE, **values})


class Given:
    """A base that predicts given tensors, in the order of the rows."""

    def __init__(self, predictions: torch.Tensor) -> None:
        self._predictions = predictions

    def predict(self, latents: Any, times: Any, states: Any) -> torch.Tensor:
        return self._predictions


# The loss of diffusers/train.py (--loss_type_reverse noise-based --with_prior_preservation) at the authors' c11fb1b:
# its own lines, run in float64 on these arrays. Its first part sums over the four channels, as the mask has one.
@pytest.mark.parametrize(
    ("kind", "expected"), [("epsilon", 10.114559795592168), ("v_prediction", 9.873549565480907)]
)  # fmt: skip
def test_the_loss_is_that_of_the_authors_code(kind: str, expected: float) -> None:
    generator = np.random.default_rng(5)
    latents, noise, predictions = (torch.from_numpy(generator.normal(size=(4, 4, 8, 8))) for _ in range(3))
    scheduler = DDIMScheduler(
        prediction_type=kind, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )  # fmt: skip
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    times = torch.tensor([10, 500])
    truth = true_prediction(scheduler, latents[:2], noise[:2], times)
    rows = Conditioning(states=torch.zeros(2, 1, 1))
    batch = Batch(
        latents[:2], times, noise[:2], torch.ones(2, dtype=torch.bool), ("snoopy",) * 2, rows, rows,
        latents[:2], latents[2:], latents[:2], times, rows, latents[:2], truth,
    )  # fmt: skip
    losses = METHODS["ca"].objective(recipe()).losses(Given(predictions), batch)  # type: ignore[arg-type]
    channels, theirs = 4, 1.0  # --prior_loss_weight
    assert float(channels * losses.erase + theirs * losses.anchor) == pytest.approx(expected, rel=1e-12)


def test_a_batch_pairs_the_concepts_sentence_with_the_anchor_concepts_noised_picture() -> None:
    plan = recipe(templates=False)
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker, plan.surrogate)
    injection = TrainableDense(select_modules(base.denoiser, plan.increment.modules))
    source = QSampleSource(base, plan, maker, anchors, injection)
    batch = source.batch(1)
    kept = base.pipe.scheduler.alphas_cumprod[batch.times.long()].view(-1, 1, 1, 1).double()
    pictures = (batch.latents.double() - (1 - kept).sqrt() * batch.noise.double()) / kept.sqrt()
    nearest = torch.cdist(pictures.flatten(1), source.pictures(0)[1].double().flatten(1)).min(dim=1).values
    assert float((nearest / pictures.flatten(1).norm(dim=1)).max()) < 1e-3
    generator = torch.Generator().manual_seed(4)
    for delta in injection.state().values():
        delta.data += 0.03 * torch.randn(delta.shape, generator=generator)
    noise = batch.noise.double().numpy()
    with torch.no_grad():
        concept, anchor = (
            base.predict(batch.latents, batch.times, base.encode([prompt] * 4)).double().numpy()
            for prompt in ("snoopy", "dog")
        )
    losses = METHODS["ca"].objective(plan).losses(base, batch)
    assert float(losses.erase.detach()) == pytest.approx(np.mean((concept - noise) ** 2), rel=1e-4)
    assert float(losses.anchor.detach()) == pytest.approx(np.mean((anchor - noise) ** 2), rel=1e-4)
    assert losses.left is not None
    assert float(losses.left) == pytest.approx(np.mean((concept - batch.neutral.double().numpy()) ** 2), rel=1e-4)
    injection.remove()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_is_true_of_a_mixture_gives_back_its_picture(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = torch.tensor([400])
    latents, times = add_noise(scheduler, picture, noise, moment)
    found = true_prediction(scheduler, picture, noise, times)
    back = scheduler.step(found, int(times[0]), latents).pred_original_sample
    torch.testing.assert_close(back, picture, rtol=1e-4, atol=1e-4)


def test_what_is_true_of_a_flow_leads_to_its_picture() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    picture, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents, times = add_noise(scheduler, picture, noise, torch.tensor([6]))
    found = true_prediction(scheduler, picture, noise, times)
    for time in scheduler.timesteps[6:]:
        latents = scheduler.step(found, time, latents).prev_sample
    torch.testing.assert_close(latents, picture, rtol=1e-4, atol=1e-4)


def test_a_training_says_how_far_the_concept_came_towards_the_anchor_concept() -> None:
    training = train(recipe(), pipe=pico_pipeline()).manifest.training
    assert training is not None
    assert training.reached is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"x_t": {}}, "--set x_t.source=q_sample --set x_t.driver=surrogate"),
        ({"x_t": {"source": "q_sample"}}, "x_t.driver 'concept' has none"),
        ({"objective": {"goal": "noise", "teacher": "base"}}, "needs no teacher"),
        ({"anchoring": {"source": "text"}}, "has to be 'surrogate'"),
        ({"method": "spm"}, "goal 'noise' would change nothing: method 'spm' does not read it(.|\n)*: 'ca'\n"),
    ],
)
def test_recipes_without_that_noise_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**values)
