"""Ends a training early: by SepME's statistic of the erase loss (arXiv 2402.05947), or by its reach."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from spm_hub.training.base_model import TeacherModel
from spm_hub.training.data.anchors import AnchorSource
from spm_hub.training.data.batch import Batch
from spm_hub.training.data.prompts import PromptMaker
from spm_hub.training.data.trajectories import TrajectorySource
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import Anchoring, EarlyStop
from spm_hub.training.trainable.trainable import Trainable

_TRAJECTORIES, _STEPS = 8, 8
HELD_OUT_ROWS = 32
"""Rows of one measurement: with `stop.every` of 5, a quarter of the time of a training in batches of 8."""


def held_out_recipe(recipe: RecipeFields) -> RecipeFields:
    """Return the recipe of the trajectories whose states no training step has; it stops nothing."""
    x_t = recipe.x_t.model_copy(
        update={
            "source": "trajectory", "steps": min(_STEPS, recipe.x_t.steps), "trajectories": _TRAJECTORIES, "chunks": 1,
        }
    )  # fmt: skip
    unanchored = Anchoring(weight=0.0, reach=None, per_target=0)
    return recipe.model_copy(update={"x_t": x_t, "anchoring": unanchored, "stop": EarlyStop()})


class EarlyStopping:
    """L_mom <- memory L_mom + (1 - memory) L, beginning with the first L.

    Eq. 37 of SepME's authors' later text (SRS-ME).
    """

    def __init__(self, recipe: EarlyStop) -> None:
        self._recipe = recipe
        self._mean = torch.nan
        self.due = False

    def note(self, step: int, erase: float) -> None:
        """Record the erase loss of `step` (from 0).

        Sets `due` once more than `after` steps are taken and L_mom <= tau.
        """
        memory = self._recipe.memory
        self._mean = erase if step == 0 else memory * self._mean + (1 - memory) * erase
        below = self._recipe.below
        self.due = self.due or (below is not None and step > self._recipe.after and self._mean <= below)

    def state(self) -> Tensor:
        """Return (2,), float64: all that a resumed training needs."""
        return torch.tensor([self._mean, self.due], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        mean, due = state.tolist()
        self._mean, self.due = mean, bool(due)


class HeldOut:
    """The share of the way to the surrogate's predictions that is gone, on states kept apart.

    The states are those of a few trajectories of the frozen base, led by the concept in sentences of its own. They are
    a function of the recipe, so that a resumed training measures on the same ones.
    """

    def __init__(
        self, base: TeacherModel, recipe: RecipeFields, maker: PromptMaker, anchors: AnchorSource, trainable: Trainable
    ) -> None:
        self._base, self._stop = base, recipe.stop
        self._source = TrajectorySource(base, held_out_recipe(recipe), maker, anchors, trainable)
        self.reached: float | None = None
        """The last measurement."""

    @cached_property
    def _batch(self) -> Batch:
        return self._source.held_out(HELD_OUT_ROWS)

    @property
    def due(self) -> bool:
        """True if the wanted share was reached at the last measurement."""
        return self._stop.reach is not None and self.reached is not None and self.reached >= self._stop.reach

    def wanted(self, taken: int) -> bool:
        """Return whether the recipe asks for a measurement after `taken` steps."""
        return self._stop.reach is not None and taken % self._stop.every == 0

    @torch.no_grad()
    def measure(self) -> None:
        """Measure now; the trainable has to be in effect."""
        batch = self._batch
        predicted = self._base.predict(batch.latents, batch.times, batch.states)
        self.reached = share_of_way(predicted, batch.concept, batch.neutral)

    def state(self) -> Tensor:
        """Return (1,), float64: all that a resumed training needs; not a number before the first measurement."""
        return torch.tensor([torch.nan if self.reached is None else self.reached], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.reached = None if bool(state.isnan().any()) else float(state)


def share_of_way(predicted: Tensor, concept: Tensor, neutral: Tensor) -> float:
    """Return <predicted - concept, neutral - concept> / |neutral - concept|^2 over all rows.

    predicted, concept, neutral: (n, *latent_shape). It is 0 at the base's prediction of the concept, 1 at that of the
    surrogate, above 1 beyond it. What moves sideways does not count.
    """
    way = (neutral - concept).double()
    return float(((predicted - concept).double() * way).sum() / way.pow(2).sum())
