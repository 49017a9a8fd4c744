"""Objectives: one file per paper, one line of registration here."""

from __future__ import annotations

from collections.abc import Callable

from spm_hub.training.methods import plugged
from spm_hub.training.parts import Objective as ObjectiveRecipe

from .base import Objective
from .esd import ESD
from .sepme import SepME
from .spm import SPM

_OWN: dict[str, Callable[[ObjectiveRecipe], Objective]] = {
    "spm": lambda recipe: SPM(recipe.eta),
    "esd": lambda recipe: ESD(recipe.eta, recipe.convention),
    "sepme": lambda recipe: SepME(),
}


def objective(recipe: ObjectiveRecipe) -> Objective:
    """The objective of a recipe: one of our own or a plug-in's."""
    plugin = plugged(recipe.name)
    return _OWN[recipe.name](recipe) if plugin is None else plugin.objective(recipe)
