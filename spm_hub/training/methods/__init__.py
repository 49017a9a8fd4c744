"""Objectives: one file per paper, one line of registration here."""

from __future__ import annotations

from collections.abc import Callable

from spm_hub.training.methods.ca import ConceptAblation
from spm_hub.training.methods.esd import ESD
from spm_hub.training.methods.fmn import ForgetMeNot
from spm_hub.training.methods.sdd import SDD
from spm_hub.training.methods.sepme import SepME
from spm_hub.training.methods.spm import SPM
from spm_hub.training.objective import Objective
from spm_hub.training.recipe.presets import plugged
from spm_hub.training.recipe.recipe import Recipe

OWN: dict[str, Callable[[Recipe], Objective]] = {
    "spm": lambda recipe: SPM(recipe.objective.eta),
    "esd": lambda recipe: ESD(recipe.objective.eta, recipe.objective.convention),
    "sepme": lambda recipe: SepME(),
    "ca": lambda recipe: ConceptAblation(recipe.objective.teacher),
    "sdd": lambda recipe: SDD(recipe.objective.teacher),
    "fmn": lambda recipe: ForgetMeNot((recipe.target, *recipe.aliases), recipe.objective.tokens),
}


def objective(recipe: Recipe) -> Objective:
    """The objective of a recipe: one of our own or a plug-in's."""
    plugin = plugged(recipe.objective.name)
    return OWN[recipe.objective.name](recipe) if plugin is None else plugin.objective(recipe.objective)
