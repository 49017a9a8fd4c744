"""What a model's configuration alone tells to be impossible, before any of its weights are loaded."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from spm_hub.training.closed_form import not_editable
from spm_hub.training.conditioning import GUIDANCE
from spm_hub.training.data.adversary import check_goal
from spm_hub.training.loop.prediction_run import check_told
from spm_hub.training.methods.fmn import cross_attentions, masked
from spm_hub.training.protection import check_room, not_separable
from spm_hub.training.recipe.protected_prompts import protects
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainable.mask import neurons
from spm_hub.training.trainable.module_selection import selected
from spm_hub.training.trainable.peft import check_kind


def check_before_loading(recipe: Recipe, folder: Path | None) -> None:
    """Raises RecipeError for a recipe that the model in this diffusers folder cannot be trained by.

    What it knows of is the denoiser's outline, the schedule and the tokenizer. Of a model that lies elsewhere, or is a
    single file, nothing is known before it runs.
    """
    if folder is None:
        return
    if protects(recipe):
        check_room(recipe, folder)
    if recipe.adversary.steps:
        check_goal(recipe.adversary, _predicts(folder / "scheduler" / "scheduler_config.json"))
    denoiser = _outline(folder)
    if denoiser is None:
        return
    modules = selected(denoiser, recipe.increment.modules)
    match recipe.increment.kind:
        case "mask":
            neurons(denoiser, recipe.masks.groups)
        case "loha" | "lokr" | "vera" | "dora" as kind:
            for path, module in modules.items():
                check_kind(kind, path, module)
    hears = GUIDANCE in inspect.signature(type(denoiser).forward).parameters
    check_told(recipe, denoiser, hears and bool(getattr(denoiser.config, "guidance_embeds", True)))
    # PixArt and Sana: what attention reads are states that a layer has changed, of which a mask says which count.
    projects = getattr(denoiser, "caption_projection", None) is not None
    if recipe.objective.name == "fmn":
        cross_attentions(denoiser)
        if projects:
            raise masked()
    if joint := [path for path in modules if projects or "attn2" not in path]:
        if protects(recipe):
            raise not_separable(joint, len(modules))
        if recipe.objective.name == "uce":
            raise not_editable(joint, len(modules))


def _outline(folder: Path) -> nn.Module | None:
    """The denoiser without weights, on the meta device; None where its class is not one of diffusers' own."""
    for name in ("unet", "transformer"):
        config = _read(folder / name / "config.json")
        kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if kind is None:
            continue
        try:
            with torch.device("meta"):
                denoiser: nn.Module = kind.from_config(config)
        except (
            Exception
        ):  # of any kind, for any damage to the configuration: whoever loads the model says what is wrong
            return None
        return denoiser
    return None


def _predicts(path: Path) -> str:
    """What a scheduler's configuration says that the model predicts: noise, unless it is a flow's or says otherwise."""
    config = _read(path)
    if "flow" in str(config.get("_class_name", "")).lower():
        return "a flow"
    return str(config.get("prediction_type", "epsilon"))


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever loads the model says what is wrong with it
        return {}
    return config if isinstance(config, dict) else {}
