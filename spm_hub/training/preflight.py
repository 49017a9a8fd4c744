"""Refuses recipes that a model's configuration rules out, before any of its weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from spm_hub.training.data.adversary import check_goal
from spm_hub.training.methods import find_method
from spm_hub.training.protection import check_room, modules_reading_more, not_separable
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import protects
from spm_hub.training.trainable.module_selection import select_modules


def check_before_loading(recipe: RecipeFields, folder: Path | None) -> None:
    """Raise RecipeError for a recipe that cannot be trained on the model in this diffusers folder.

    It reads the denoiser's configuration, the schedule and the tokenizer. Nothing is checked for `folder` None: a model
    that is a single file or not on this disk.
    """
    if folder is None:
        return
    if protects(recipe):
        check_room(recipe, folder)
    if recipe.adversary.steps:
        check_goal(recipe.adversary, _predicts(folder / "scheduler" / "scheduler_config.json"))
    denoiser = _outline(folder)
    method = find_method(recipe.method)
    if denoiser is None or method is None:
        return
    modules = select_modules(denoiser, recipe.increment.modules)
    method.check_model(recipe, denoiser)
    if protects(recipe) and (joint := modules_reading_more(denoiser, modules)):
        raise not_separable(joint, len(modules))


def _outline(folder: Path) -> nn.Module | None:
    """Return the denoiser without weights, on the meta device; None if diffusers does not have its class."""
    for name in ("unet", "transformer"):
        config = _read(folder / name / "config.json")
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if kind is None:
            continue
        try:
            with torch.device("meta"):
                denoiser: nn.Module = kind.from_config(config)
        except Exception:  # for any damage to the configuration; loading the model reports it
            return None
        return denoiser
    return None


def _predicts(path: Path) -> str:
    """Return the prediction type of a scheduler's configuration: "epsilon" unless it says otherwise."""
    config = _read(path)
    if "flow" in str(config.get("_class_name", "")).lower():
        return "a flow"
    return str(config.get("prediction_type", "epsilon"))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading the model reports it
        return {}
    return config if isinstance(config, dict) else {}
