"""Reads from a recipe which prompts are protected, without any tensor.

An impossible recipe is therefore refused before a model is loaded.
"""

from __future__ import annotations

from typing import TypeVar

from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.schema import Companion

R = TypeVar("R", bound=RecipeFields)

TEXT_MODULES = ("text", "esd-x-strict", "esd-x-strict-text")
"""The selections of which every module reads the text states."""


def protects(recipe: RecipeFields) -> bool:
    """Return whether the increment has to leave any prompt alone."""
    return recipe.increment.kind == "null_space" or recipe.protection.separable


def exactly_protected(recipe: RecipeFields) -> tuple[str, ...]:
    """Return the prompts whose states the increment sends to zero.

    They are the empty one, the surrogate, the concepts of other erasers, and `protection.prompts` unless these are
    protected by principal directions.
    """
    others = (*recipe.protection.erased, *(companion.target for companion in recipe.together))
    prompts = () if recipe.protection.directions is not None else recipe.protection.prompts or ()
    return tuple(dict.fromkeys(("", recipe.surrogate, *others, *prompts)))


def members(recipe: R) -> tuple[R, ...]:
    """Return one recipe for each concept of the run, in an order that is the same for all of them."""
    me = Companion(target=recipe.target, aliases=recipe.aliases, kind=recipe.kind)
    all_of_them = sorted((me, *recipe.together), key=lambda companion: companion.target)
    found = []
    for one in all_of_them:
        others = tuple(companion for companion in all_of_them if companion != one)
        name = recipe.name if one == me else None
        found.append(recipe.model_copy(update={**dict(one), "name": name, "together": others}))
    return tuple(found)


def normalise_prompt(prompt: str) -> str:
    """Return a prompt in small letters with single spaces, as case-insensitive text encoders read it."""
    return " ".join(prompt.casefold().split())
