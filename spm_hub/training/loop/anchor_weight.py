"""Steers lambda, the weight of anchoring, by the progress of the erasure.

The paper sets lambda by hand, for one base. Its effect differs with the concept and the base: too small, and the
neighbours change more than they have to; too large, and the concept stays. Here lambda grows while the concept's
predictions have less of their way left than `Anchoring.reach` asks for, and shrinks while they have more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spm_hub.training.objective import Objective
from spm_hub.training.recipe.fields import RecipeFields

_MEMORY = 0.9  # of the running means, per step
_PACE = 8.0  # the most that lambda can grow over a training, as a power of e, for each unit of relative error
_RANGE = 8.0  # times the recipe's lambda, up and down
_BEGINS = 0.25  # of the steps: before, nothing is erased yet, which says nothing of lambda


class AnchorWeight:
    """Lambda of a running training."""

    def __init__(self, recipe: RecipeFields) -> None:
        self._recipe = recipe
        self.weight = recipe.anchoring.weight
        self._erase = self._whole = 0.0

    @property
    def left(self) -> float | None:
        """The erase loss as a share of that before training, averaged over steps; None before the first."""
        return self._erase / self._whole if self._whole > 0 else None

    def note(self, step: int, erase: float, whole: float, objective: Objective) -> None:
        """Set the next step's lambda from a batch's erase loss, now and before training."""
        self._erase = _MEMORY * self._erase + erase
        self._whole = _MEMORY * self._whole + whole
        anchoring = self._recipe.anchoring
        if anchoring.reach is None or step < _BEGINS * self._recipe.steps or self._whole == 0.0:
            return
        wanted = max(objective.left_at(anchoring.reach), 1e-2)
        error = max(-1.0, min(1.0, 1 - self._erase / self._whole / wanted))
        steered = self.weight * math.exp(_PACE * error / self._recipe.steps)
        self.weight = min(max(steered, anchoring.weight / _RANGE), anchoring.weight * _RANGE)

    def state(self) -> Tensor:
        """Return (3,), float64: all that a resumed training needs."""
        return torch.tensor([self.weight, self._erase, self._whole], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        self.weight, self._erase, self._whole = state.tolist()
