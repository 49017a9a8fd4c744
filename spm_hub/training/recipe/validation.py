"""Refuses impossible recipes and keys that nothing would read, before any model is loaded.

Each check raises ValueError with the key, both values and the nearest valid choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.presets import preset_of
from spm_hub.training.recipe.protected_prompts import TEXT_MODULES, folded, held_exactly, jointly, members, protects
from spm_hub.training.recipe.schema import (
    PEFT_KINDS,
    Anchoring,
    ClosedForm,
    IncrementRecipe,
    Optimiser,
    Protection,
    XtSource,
)


def check_surrogate(recipe: RecipeFields) -> None:
    """Refuse a surrogate that is itself erased."""
    names = [recipe.target, *recipe.aliases]
    for companion in recipe.together:
        names += [companion.target, *companion.aliases]
    if (put := folded(recipe.surrogate)) in map(folded, names):
        raise ValueError(
            f"surrogate {put!r} is itself to be erased, so that nothing would change: surrogate is what is drawn "
            "in the concept's place; leave it out for nothing at all"
        )


def check_trained(recipe: RecipeFields) -> None:
    """Refuse what a trained method cannot do."""
    if recipe.closed_form != ClosedForm():
        raise ValueError(f"closed_form belongs to method 'uce', not to {recipe.method!r}")
    held = set(map(folded, recipe.anchoring.prompts))
    if clash := held.intersection(map(folded, (recipe.target, *recipe.aliases))):
        raise ValueError(f"anchoring.prompts: {sorted(clash)[0]!r} is both to be erased and to be held")
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
            f"erase_from {recipe.erase_from!r} needs what the frozen base predicts, and objective.teacher is "
            "'student', the model being erased: method 'esd-x' has it, or objective.teacher 'base'"
        )
    if recipe.erase_from is not None and recipe.objective.paired:
        raise ValueError(
            f"erase_from {recipe.erase_from!r} has the empty prompt beside it, and objective.paired another "
            "sentence: choose one of them"
        )
    if recipe.objective.name == "ca" and not recipe.surrogate:
        raise ValueError(
            "method 'ca' makes the concept into an anchor concept, which surrogate has to name: "
            "surrogate: dog for snoopy, surrogate: painting for a style; method 'sdd' needs none"
        )
    if (recipe.objective.paired or recipe.anchoring.source == "surrogate") and not recipe.surrogate:
        raise ValueError("objective.paired and anchoring.source 'surrogate' need a surrogate, and it is empty")
    if recipe.objective.name == "fmn":
        if recipe.erase_from is not None:
            raise ValueError("method 'fmn' looks away from the concept's own words and has no erase_from; esd-x has")
        if recipe.anchoring.weight and recipe.anchoring.reach is not None:
            raise ValueError("method 'fmn' has no prediction to steer by: anchoring.reach has to be null with it")
    check_idle(recipe)


def check_masks(recipe: RecipeFields) -> None:
    """Refuse what Minimalist's masks cannot do."""
    unused = {"trajectories", "chunks", "source", "driver", "told"}
    if recipe.increment != IncrementRecipe(kind="mask"):
        raise ValueError(
            f"method {recipe.method!r} switches neurons off: its increment is of kind 'mask'; "
            "another increment has method 'spm' or 'esd-x'"
        )
    if recipe.anchoring != Anchoring():
        raise ValueError(f"method {recipe.method!r} has no anchoring: it holds the rest by masks.beta")
    for key, other in (
        ("erase_from", "esd-x"),
        ("start_from", "esd-x"),
        ("adversary", "race"),
        ("regulariser", "sepme"),
        ("stop", "sepme"),
        ("together", "sepme"),
        ("protection", "sepme"),
    ):
        if getattr(recipe, key) != RecipeFields.model_fields[key].default:
            raise ValueError(f"method {recipe.method!r} has no {key}; method {other!r} has")
    if recipe.x_t.model_dump(include=unused) != XtSource().model_dump(include=unused):
        raise ValueError(
            f"method {recipe.method!r} draws whole pictures: of x_t it has steps and guidance, not {sorted(unused)}"
        )
    if len(recipe.x_t.guidance) != 1 or recipe.x_t.guidance[0] < 1:
        raise ValueError(
            f"method {recipe.method!r} draws under one guidance of 1 or more, for instance x_t.guidance=[3.0] "
            f"(got {list(recipe.x_t.guidance)})"
        )
    if recipe.optimiser.ema is not None:
        raise ValueError(f"method {recipe.method!r} keeps no moving average: optimiser.ema has to be null")
    if recipe.optimiser.scale_lr:
        raise ValueError(f"method {recipe.method!r} has one lr for all neurons: optimiser.scale_lr has to be false")
    if recipe.batch_size * recipe.masks.accumulate % 2:
        raise ValueError(
            f"method {recipe.method!r} trains on the concept and on anything else by turns: batch_size "
            f"{recipe.batch_size} times masks.accumulate {recipe.masks.accumulate} has to be even"
        )


def check_closed(recipe: RecipeFields) -> None:
    """Refuse what a closed form would not read."""
    names = [recipe.target, *recipe.aliases]
    for companion in recipe.together:
        names += [companion.target, *companion.aliases]
    if clash := set(map(folded, names)).intersection(map(folded, recipe.closed_form.preserve)):
        raise ValueError(f"closed_form.preserve: {sorted(clash)[0]!r} is both to be erased and to be held")
    fields = RecipeFields.model_fields
    loops = (
        "erase_from", "x_t", "anchoring", "adversary", "start_from", "optimiser", "regulariser", "stop",
        "steps", "batch_size", "templates",
    )  # fmt: skip
    preset = preset_of(recipe.method) or {}
    for key in loops:
        if getattr(recipe, key) != preset.get(key, fields[key].default):
            raise ValueError(f"method {recipe.method!r} is a closed form, without a training loop: it has no {key}")
    if recipe.increment.kind != "low_rank" or recipe.increment.rank != 1:
        raise ValueError(
            f"method {recipe.method!r} gives an exact low_rank increment: increment.kind cannot be chosen, "
            "and in place of increment.rank it has closed_form.rank"
        )
    if recipe.increment.modules != "esd-x-strict":
        raise ValueError(f"method {recipe.method!r} edits keys and values of cross-attention, 'esd-x-strict', only")


def check_separable(recipe: RecipeFields) -> None:
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


# What stands for none of it, whoever presets something else.
_OFF: Mapping[str, object] = {"reach": None, "per_target": 0}


def check_idle(recipe: RecipeFields) -> None:
    """Raises ValueError, naming the key and what makes it idle, for a recipe that is trained in a loop."""
    anchoring, increment = recipe.anchoring, recipe.increment
    preset = preset_of(recipe.method) or {}
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
    held = preset.get("anchoring", {})
    # A weight of 0 that is asked for, in place of a method's own, is an ablation, and the rest may stay as it was.
    if anchoring.weight == 0 and held.get("weight") == 0:
        for key in sorted(_changed(anchoring, held)):
            if getattr(anchoring, key) != _OFF.get(key, ...):
                raise ValueError(
                    f"anchoring.{key} is {getattr(anchoring, key)!r}, but anchoring.weight 0: nothing would be "
                    "held; set anchoring.weight too (and anchoring.per_target to 1 or more)"
                )
    elif anchoring.weight > 0 and anchoring.per_target == 0:
        raise ValueError(
            f"anchoring.weight is {anchoring.weight:g}, but anchoring.per_target 0: nothing would be held; set "
            "anchoring.per_target to 1 or more"
        )
    if recipe.objective.name == "fmn" and recipe.surrogate and "surrogate" not in (anchoring.source, recipe.x_t.driver):
        raise ValueError(
            f"method 'fmn' turns attention away from the concept, to nothing else: nobody would ask for surrogate "
            f"{recipe.surrogate!r}; leave it out, or method 'ca' or 'esd-x'"
        )


def _changed(anchoring: Anchoring, preset: Mapping[str, Any]) -> set[str]:
    """The keys that are neither as the method presets them nor as they are by default."""
    default = Anchoring()
    return {
        key
        for key in Anchoring.model_fields
        if getattr(anchoring, key) not in (getattr(default, key), preset.get(key, ...))
    }
