"""What a recipe says about protected prompts: which they are, and what can be protected at all.

No tensor is needed to know it, so that an impossible recipe is refused before any model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spm_hub.training.recipe.schema import Companion, Protection

if TYPE_CHECKING:
    from spm_hub.training.recipe.recipe import Recipe

TEXT_MODULES = ("esd-x-strict", "esd-x-strict-text")
"""The selections that hold nothing but what reads the text states."""


def protects(recipe: Recipe) -> bool:
    """Whether the increment is to leave any prompt alone."""
    return recipe.increment.kind == "null_space" or recipe.protection.separable


def jointly(recipe: Recipe) -> bool:
    """Whether the erasers of several concepts are made to stand side by side: without a say in each other's (SepME), or
    as the shares of one solution (UCE)."""
    return recipe.increment.kind == "null_space" or recipe.objective.name == "uce"


def held_exactly(recipe: Recipe) -> tuple[str, ...]:
    """Prompts whose states an increment sends to zero: the empty one, the surrogate, what others erase, and `prompts`
    unless they are held by their principal directions."""
    others = (*recipe.protection.erased, *(companion.target for companion in recipe.together))
    prompts = () if recipe.protection.directions is not None else recipe.protection.prompts
    return tuple(dict.fromkeys(("", recipe.surrogate, *others, *prompts)))


def members(recipe: Recipe) -> tuple[Recipe, ...]:
    """One recipe for each concept of the run, in an order that does not depend on which of them is asked for."""
    me = Companion(target=recipe.target, aliases=recipe.aliases, kind=recipe.kind)
    all_of_them = sorted((me, *recipe.together), key=lambda companion: companion.target)
    found = []
    for one in all_of_them:
        others = tuple(companion for companion in all_of_them if companion != one)
        name = recipe.name if one == me else None
        found.append(recipe.model_copy(update={**dict(one), "name": name, "together": others}))
    return tuple(found)


def check_separable(recipe: Recipe) -> None:
    """Raises ValueError for a recipe whose protection no model could give it, with the nearest valid choice."""
    kind, modules = recipe.increment.kind, recipe.increment.modules
    if kind == "null_space" and modules not in TEXT_MODULES:
        raise ValueError(
            f"increment.kind 'null_space' changes what reads the text states, not the modules of {modules!r}: "
            "increment.modules has to be 'esd-x-strict'"
        )
    if recipe.protection.separable and modules not in TEXT_MODULES:
        raise ValueError(
            f"protection.separable with increment.modules {modules!r}: only keys and values of cross-attention read "
            "the text states, and what else these modules change would reach protected prompts; "
            "try --set increment.modules=esd-x-strict"
        )
    if not protects(recipe) and recipe.protection != Protection():
        raise ValueError(
            f"protection needs an increment that can give it, and kind {kind!r} alone cannot: try --method sepme, "
            "or --separable with --set increment.modules=esd-x-strict"
        )
    if protects(recipe) and recipe.increment.dtype != "float32":
        raise ValueError(
            f"increment.dtype {recipe.increment.dtype!r} would round what sends protected prompts to zero: a "
            "protecting increment has to be of 'float32'"
        )
    names = [folded(recipe.target), *(folded(companion.target) for companion in recipe.together)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"together names {twice!r} twice")
    for member in members(recipe) if protects(recipe) else ():
        held = set(map(folded, (*held_exactly(member), *recipe.protection.prompts)))
        if clash := held.intersection(map(folded, (member.target, *member.aliases))):
            name = sorted(clash)[0]
            raise ValueError(
                f"{name!r} cannot be erased and protected at once: take it out of protection, or surrogate"
            )
    if recipe.objective.name == "sepme" and recipe.erase_from is not None:
        raise ValueError("erase_from belongs to targets that are predictions: objective 'sepme' has none; try esd-x")
    if recipe.together and not jointly(recipe):
        raise ValueError(
            f"together needs increments that leave each other's concepts alone, and kind {kind!r} does not: "
            "try --method sepme or uce, or train one after the other"
        )
    if recipe.start_from is not None and kind == "null_space":
        raise ValueError("start_from belongs to low_rank and dense increments: null_space begins with nothing erased")


def folded(prompt: str) -> str:
    """A prompt as text encoders that know no case tell it from others."""
    return " ".join(prompt.casefold().split())
