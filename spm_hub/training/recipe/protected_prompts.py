"""What a recipe says about protected prompts: which they are, and what can be protected at all.

No tensor is needed to know it, so that an impossible recipe is refused before any model is loaded.
"""

from __future__ import annotations

from typing import TypeVar

from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import Companion

R = TypeVar("R", bound=RecipeFields)

TEXT_MODULES = ("esd-x-strict", "esd-x-strict-text")
"""The selections that hold nothing but what reads the text states."""


def protects(recipe: RecipeFields) -> bool:
    """Whether the increment is to leave any prompt alone."""
    return recipe.increment.kind == "null_space" or recipe.protection.separable


def jointly(recipe: RecipeFields) -> bool:
    """Whether the erasers of several concepts are made to stand side by side: without a say in each other's (SepME), or
    as the shares of one solution (UCE)."""
    return recipe.increment.kind == "null_space" or recipe.objective.name == "uce"


def held_exactly(recipe: RecipeFields) -> tuple[str, ...]:
    """Prompts whose states an increment sends to zero: the empty one, the surrogate, what others erase, and `prompts`
    unless they are held by their principal directions."""
    others = (*recipe.protection.erased, *(companion.target for companion in recipe.together))
    prompts = () if recipe.protection.directions is not None else recipe.protection.prompts
    return tuple(dict.fromkeys(("", recipe.surrogate, *others, *prompts)))


def members(recipe: R) -> tuple[R, ...]:
    """One recipe for each concept of the run, in an order that does not depend on which of them is asked for."""
    me = Companion(target=recipe.target, aliases=recipe.aliases, kind=recipe.kind)
    all_of_them = sorted((me, *recipe.together), key=lambda companion: companion.target)
    found = []
    for one in all_of_them:
        others = tuple(companion for companion in all_of_them if companion != one)
        name = recipe.name if one == me else None
        found.append(recipe.model_copy(update={**dict(one), "name": name, "together": others}))
    return tuple(found)


def folded(prompt: str) -> str:
    """A prompt as text encoders that know no case tell it from others."""
    return " ".join(prompt.casefold().split())
