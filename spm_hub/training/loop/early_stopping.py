"""When to end a training early: SepME's momentum statistic of the erase loss (arXiv 2402.05947)."""

from __future__ import annotations

import torch
from torch import Tensor

from spm_hub.training.recipe.schema import EarlyStop


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
