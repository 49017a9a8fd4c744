"""Refuses impossible recipes and keys that a method does not read, before any model is loaded.

Each check raises ValueError with the key, both values and the nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import (
    TEXT_MODULES,
    exactly_protected,
    members,
    normalise_prompt,
    protects,
)
from spm_hub.training.recipe.schema import (
    PEFT_KINDS,
    Anchoring,
    IncrementRecipe,
    Optimiser,
    Protection,
    RecipePart,
)

_ALWAYS_READ = frozenset({
    "target", "aliases", "kind", "surrogate", "name", "model", "method", "objective.name", "options", "resolution",
    "seed", "strength",
})  # fmt: skip
_MOST_NAMES = 4  # of methods, in a message


class ImpossibleRecipeError(ValueError):
    """A recipe that cannot be, and the option that mends it."""

    def __init__(self, message: str, mend: str) -> None:
        super().__init__(message)
        self.mend = mend


def check_unused_keys(
    recipe: RecipeFields,
    preset: Mapping[str, Any],
    reads: Callable[[str], bool],
    reason: Callable[[str], str | None],
    readers: Callable[[str], Sequence[str]],
) -> None:
    """Refuse a key that is set and that the recipe's method does not read.

    preset: the method's values of keys.  reads: of a key, whether the method reads it.  reason: why it does not.
    readers: the names of the methods that do.
    """
    for key, value, usual in _leaves(recipe, preset):
        if value == usual or key in _ALWAYS_READ or reads(key):
            continue
        names = readers(key)
        others = ", ".join(map(repr, names[:_MOST_NAMES])) + (
            f" and {len(names) - _MOST_NAMES} more" if names[_MOST_NAMES:] else ""
        )
        why = reason(key)
        raise ValueError(
            f"{key} {value!r} would change nothing: method {recipe.method!r} does not read it"
            + (f"; {why}" if why else "")
            + f". Leave it at {usual!r}{f', or take a method that reads it: {others}' if others else ''}"
        )


def _leaves(recipe: RecipeFields, preset: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, value without any choice of the user) of every key, as "part.key" in parts."""
    for name, field in RecipeFields.model_fields.items():
        value = getattr(recipe, name)
        if name == "options" or not isinstance(value, RecipePart):
            yield name, value, preset.get(name, field.default)
            continue
        usual = type(value).model_validate(preset.get(name, {}))
        for key in type(value).model_fields:
            yield f"{name}.{key}", getattr(value, key), getattr(usual, key)


def refuse_erased(recipe: RecipeFields, key: str, prompts: Sequence[str]) -> None:
    """Refuse `prompts`, the value of `key`, that keep a concept of the run."""
    names = [recipe.target, *recipe.aliases]
    for companion in recipe.together:
        names += [companion.target, *companion.aliases]
    if clash := set(map(normalise_prompt, names)).intersection(map(normalise_prompt, prompts)):
        raise ValueError(f"{key}: {sorted(clash)[0]!r} is both to be erased and to be kept")


def check_surrogate(recipe: RecipeFields) -> None:
    """Refuse a surrogate that is itself erased."""
    names = [recipe.target, *recipe.aliases]
    for companion in recipe.together:
        names += [companion.target, *companion.aliases]
    if (put := normalise_prompt(recipe.surrogate)) in map(normalise_prompt, names):
        raise ValueError(
            f"surrogate {put!r} is itself to be erased, so that nothing would change: surrogate names "
            "something to draw in the concept's place; leave it out to draw nothing"
        )


def check_combinations(recipe: RecipeFields) -> None:
    """Refuse keys that contradict each other whatever the method."""
    if recipe.erase_from is not None and recipe.templates:
        raise ValueError("erase_from is one whole prompt: templates has to be false with it")
    if recipe.adversary.keywords and (recipe.templates or not recipe.aliases or recipe.erase_from is not None):
        raise ValueError(
            "adversary.keywords trains on the bare target and its aliases in turn: it needs aliases, and goes with "
            "neither templates nor erase_from"
        )
    if recipe.start_sha256 is not None and recipe.start_from is None:
        raise ValueError("start_sha256 is given, but no start_from")
    anchors = set(map(normalise_prompt, recipe.anchoring.prompts))
    if clash := anchors.intersection(map(normalise_prompt, (recipe.target, *recipe.aliases))):
        raise ValueError(f"anchoring.prompts: {sorted(clash)[0]!r} is both to be erased and to be kept")
    if recipe.increment.kind in PEFT_KINDS:
        for what, given in (
            ("start_from", recipe.start_from is not None),
            ("regulariser.l1", recipe.regulariser.l1 > 0),
        ):
            if given:
                raise ValueError(
                    f"{what} goes with increment.kind 'low_rank' or 'dense', not with {recipe.increment.kind!r}: "
                    f"try --increment lora:{min(recipe.increment.rank, 16)}"
                )
    if recipe.erase_from is not None and recipe.objective.teacher == "student":
        raise ValueError(
            f"erase_from {recipe.erase_from!r} needs the frozen base's prediction, and objective.teacher is "
            "'student', the model being erased: method 'esd-x' has it, or objective.teacher 'base'"
        )
    if recipe.erase_from is not None and recipe.objective.paired:
        raise ValueError(
            f"erase_from {recipe.erase_from!r} compares with the empty prompt, and objective.paired with another "
            "sentence: choose one of them"
        )
    check_spm_prompts(recipe)
    if (recipe.objective.paired or recipe.anchoring.source == "surrogate") and not recipe.surrogate:
        raise ValueError("objective.paired and anchoring.source 'surrogate' need a surrogate, and it is empty")


def check_spm_prompts(recipe: RecipeFields) -> None:
    """Refuse SPM's `positive` and `unconditional` prompts where nothing reads them."""
    positive, unconditional = recipe.objective.positive, recipe.x_t.unconditional
    if recipe.x_t.source == "trajectory":
        for key, value in (("objective.positive", positive), ("x_t.unconditional", unconditional)):
            if value:
                raise ImpossibleRecipeError(
                    f"{key} {value!r} is for latents drawn on their own, and x_t.source is 'trajectory'",
                    mend="--set x_t.source=student",
                )
    if positive is not None and recipe.erase_from is not None:
        raise ImpossibleRecipeError(
            f"objective.positive {positive!r} and erase_from {recipe.erase_from!r} both say what the target is made of",
            mend="leave one of them out",
        )
    if positive is not None and normalise_prompt(positive) == normalise_prompt(recipe.surrogate):
        raise ImpossibleRecipeError(
            f"objective.positive {positive!r} is the surrogate: the target would be pushed away from nothing",
            mend="leave objective.positive out, for the concept itself",
        )


def is_separable(recipe: RecipeFields) -> bool:
    """Return whether the increment leaves other concepts alone by its kind."""
    return recipe.increment.kind == "null_space"


def check_prediction(recipe: RecipeFields) -> None:
    """Refuse an increment that cannot be trained by comparing predictions."""
    if recipe.increment.kind == "mask":
        raise ValueError(
            f"increment.kind 'mask' cannot be trained by method {recipe.method!r}: method 'minimalist' trains masks"
        )


def check_protection(recipe: RecipeFields, is_joint: bool) -> None:
    """Refuse protection that no model could give.

    is_joint: whether the method trains several concepts in one run into erasers that leave each other's alone.
    """
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
            f"increment.dtype {recipe.increment.dtype!r} would round the numbers that send protected prompts to zero; "
            "a protecting increment has to be of 'float32'"
        )
    names = [normalise_prompt(recipe.target), *(normalise_prompt(companion.target) for companion in recipe.together)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"together names {twice!r} twice")
    for member in members(recipe) if protects(recipe) else ():
        protected = set(map(normalise_prompt, (*exactly_protected(member), *(recipe.protection.prompts or ()))))
        if clash := protected.intersection(map(normalise_prompt, (member.target, *member.aliases))):
            name = sorted(clash)[0]
            raise ValueError(
                f"{name!r} cannot be erased and protected at once: take it out of protection, or surrogate"
            )
    if recipe.together and not is_joint:
        raise ValueError(
            f"together needs increments that leave each other's concepts alone, and kind {kind!r} does not: "
            "try --method sepme or uce, or train one after the other"
        )
    if recipe.start_from is not None and kind == "null_space":
        raise ValueError("start_from belongs to low_rank and dense increments: null_space begins with nothing erased")


# Values that mean "disabled"; allowed even where a preset sets something else.
_OFF: Mapping[str, object] = {"reach": None, "per_target": 0, "drawn": 0}


def check_idle_keys(recipe: RecipeFields, preset: Mapping[str, Any]) -> None:
    """Refuse a key that the values of other keys make idle.

    preset: the method's values of keys.
    """
    anchoring, increment = recipe.anchoring, recipe.increment
    usual = IncrementRecipe.model_fields["beta"].default, preset.get("increment", {}).get("beta")
    if increment.kind != "null_space" and increment.beta not in usual:
        raise ValueError(
            f"increment.beta {increment.beta:g} belongs to kind 'null_space', not to {increment.kind!r}: leave it out"
        )
    if recipe.x_t.source == "student" and len(recipe.x_t.guidance) > 1:
        raise ValueError(
            f"x_t.source 'student' draws under one guidance, and {list(recipe.x_t.guidance)} are "
            f"{len(recipe.x_t.guidance)}: set x_t.guidance to one, for instance [3.0]"
        )
    usual = 0, preset.get("anchoring", {}).get("drawn")
    if recipe.x_t.source != "trajectory" and anchoring.drawn not in usual:
        raise ValueError(
            f"anchoring.drawn {anchoring.drawn} belongs to x_t.source 'trajectory', and {recipe.x_t.source!r} draws "
            "new anchors for every batch: leave it out"
        )
    if recipe.optimiser.schedule != "cosine_restarts" and recipe.optimiser.cycles != Optimiser().cycles:
        raise ValueError(
            f"optimiser.cycles {recipe.optimiser.cycles} belongs to schedule 'cosine_restarts', not to "
            f"{recipe.optimiser.schedule!r}: set optimiser.schedule too"
        )
    usual = Anchoring().alpha, preset.get("anchoring", {}).get("alpha")
    if anchoring.source in ("gaussian", "surrogate") and anchoring.alpha not in usual:
        raise ValueError(
            f"anchoring.alpha {anchoring.alpha:g} chooses among sentences, and anchoring.source "
            f"{anchoring.source!r} has none to choose from: leave it out"
        )
    preset_anchoring = preset.get("anchoring", {})
    # A weight of 0 that is asked for, in place of a method's own, is an ablation, and the rest may stay as it was.
    if anchoring.weight == 0 and preset_anchoring.get("weight") == 0:
        for key in sorted(_changed(anchoring, preset_anchoring)):
            if getattr(anchoring, key) != _OFF.get(key, ...):
                raise ValueError(
                    f"anchoring.{key} is {getattr(anchoring, key)!r}, but anchoring.weight 0: nothing would be "
                    "kept; set anchoring.weight too (and anchoring.per_target to 1 or more)"
                )
    elif anchoring.weight > 0 and anchoring.per_target == 0:
        raise ValueError(
            f"anchoring.weight is {anchoring.weight:g}, but anchoring.per_target 0: nothing would be kept; set "
            "anchoring.per_target to 1 or more"
        )


def _changed(anchoring: Anchoring, preset: Mapping[str, Any]) -> set[str]:
    """Return the keys whose values are neither the preset's nor the default ones."""
    default = Anchoring()
    return {
        key
        for key in Anchoring.model_fields
        if getattr(anchoring, key) not in (getattr(default, key), preset.get(key, ...))
    }
