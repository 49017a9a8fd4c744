"""Keys of a recipe that nothing would read: refused, as whoever sets one believes that it does something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spm_hub.training.recipe.presets import preset_of
from spm_hub.training.recipe.schema import Anchoring, IncrementRecipe, Optimiser

if TYPE_CHECKING:
    from spm_hub.training.recipe.recipe import Recipe

# What stands for none of it, whoever presets something else.
_OFF: Mapping[str, object] = {"reach": None, "per_target": 0}


def check_idle(recipe: Recipe) -> None:
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
