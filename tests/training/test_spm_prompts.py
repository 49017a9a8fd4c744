"""SPM's `positive` and `unconditional` prompts, against numbers of its authors' code and identities of guidance."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from pico import pico_pipeline

from spm_hub.errors import RecipeError
from spm_hub.training import Recipe, train
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.conditioning import Conditioning
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.data.sampling import generator_for
from spm_hub.training.data.student import StudentSource
from spm_hub.training.methods import METHODS
from spm_hub.training.trainable.low_rank import TrainableLowRank

STUDENT = {"source": "student", "steps": 5, "guidance": [3.0]}


def recipe(**values: Any) -> Recipe:
    return Recipe.make(
        **{"target": "snoopy", "templates": False, "steps": 4, "batch_size": 2, "x_t": STUDENT, **values}
    )


class Given:
    """A base that predicts given tensors, in the order of the rows."""

    def __init__(self, predictions: torch.Tensor) -> None:
        self._predictions = predictions

    def predict(self, latents: Any, times: Any, states: Any) -> torch.Tensor:
        return self._predictions


def test_the_losses_are_those_of_the_authors_erase_with_la() -> None:
    """Numbers of PromptEmbedsPair.loss at 3dd762e: guidance_scale 1.3, la_strength 1000, on these arrays in float64."""
    random = np.random.default_rng(7)
    target, positive, neutral, anchor, kept = (torch.from_numpy(random.normal(size=(2, 4, 8, 8))) for _ in range(5))
    rows = Conditioning(torch.zeros(2, 1, 1))
    concept, times = torch.zeros_like(target), torch.tensor([1, 2])
    batch = Batch(
        target, times, target, torch.ones(2, dtype=torch.bool), ("snoopy",) * 2, rows, rows, concept, neutral,
        target, times, rows, kept, positive=positive,
    )  # fmt: skip
    plan = recipe(objective={"eta": 1.3, "positive": "a dog"})
    objective = METHODS[plan.method].objective
    assert objective is not None
    spm = objective(plan)
    losses = spm.losses(cast(TeacherModel, Given(torch.cat([target, anchor]))), batch)
    assert float(losses.erase) == pytest.approx(8.006802046254965, rel=1e-14)
    assert float(losses.anchor) == pytest.approx(1.9483140439611, rel=1e-14)
    assert float(spm.loss(losses.erase, losses.anchor, 1000.0)) == pytest.approx(1956.320846007355, rel=1e-14)
    goal = neutral.numpy() - 1.3 * (positive.numpy() - neutral.numpy())
    assert float(losses.distance) == pytest.approx(np.mean(goal**2), rel=1e-12)


def drawn(plan: Recipe) -> tuple[TeacherModel, Batch]:
    base = TeacherModel(pico_pipeline())
    maker = PromptMaker(("snoopy",), plan.kind, Words.load(), vocabulary_words(base.pipe.tokenizer))
    anchors = AnchorSource(base, plan.anchoring, plan.target, maker)
    trainable = TrainableLowRank(base.denoiser, 1, generator_for(0, 2, 0))
    batch = StudentSource(base, plan, maker, anchors, trainable).batch(3)
    trainable.remove()
    return base, batch


def test_guidance_away_from_the_concept_itself_is_none() -> None:
    """u + g (t - u) with u = t is t, whatever g: the latents are those drawn under guidance 1."""
    alone = drawn(recipe(x_t={**STUDENT, "guidance": [1.0]}))[1].latents
    itself = drawn(recipe(x_t={**STUDENT, "unconditional": "snoopy"}))[1].latents
    torch.testing.assert_close(itself, alone, rtol=1e-4, atol=1e-4)
    assert float((drawn(recipe())[1].latents - alone).abs().max()) > 1e-2


@pytest.mark.parametrize("source", ["student", "q_sample"])
def test_the_positive_prompts_prediction_is_the_frozen_bases(source: str) -> None:
    plan = recipe(objective={"positive": "red dog"}, x_t={**STUDENT, "source": source, "trajectories": 2, "chunks": 1})
    assert train(plan, pipe=pico_pipeline()).manifest.recipe["objective"]["positive"] == "red dog"
    if source == "student":
        base, batch = drawn(plan)
        with torch.no_grad():
            expected = base.predict(batch.latents, batch.times, base.encode(["red dog"] * 2))
        assert batch.positive is not None
        torch.testing.assert_close(batch.positive, expected, rtol=1e-4, atol=1e-5)
        assert float((batch.positive - batch.concept).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"objective": {"positive": "a dog"}, "x_t": {}}, "--set x_t.source=student"),
        ({"x_t": {"unconditional": "a dog"}}, "--set x_t.source=student"),
        ({"objective": {"positive": "a dog"}, "surrogate": "A  dog"}, "pushed away from nothing"),
        ({"objective": {"positive": "a dog"}, "erase_from": "a cat"}, "leave one of them out"),
        ({"objective": {"positive": "a dog"}, "method": "esd-x"}, "'esd-x' does not read it(.|\n)*: 'spm', 'race-spm'"),
    ],
)
def test_prompts_that_nothing_reads_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        recipe(**values)
