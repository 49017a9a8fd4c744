"""Objectives: one file per paper, one line of registration here."""

from __future__ import annotations

from collections.abc import Callable

from spm_hub.training.parts import Objective as ObjectiveRecipe

from .base import Objective
from .esd import ESD
from .spm import SPM

OBJECTIVES: dict[str, Callable[[ObjectiveRecipe], Objective]] = {
    "spm": lambda recipe: SPM(recipe.eta),
    "esd": lambda recipe: ESD(recipe.eta, recipe.convention),
}
