"""Erasing without a training loop: text states in, the solved increment out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from spm_hub.architectures import shape_of, weight_of
from spm_hub.errors import RecipeError
from spm_hub.increments import LowRank

from .base import BaseModel
from .objectives.uce import edit
from .recipe import Recipe


@torch.no_grad()
def solved(recipe: Recipe, base: BaseModel, modules: Mapping[str, nn.Module]) -> dict[str, LowRank]:
    """UCE's increments on `modules`, float64: target and aliases, all at once, become the surrogate.

    Their rank is the number of names. Raises RecipeError where the modules do not read the text encoder's own states,
    or a weight is quantised.
    """
    names = (recipe.target, *recipe.aliases)
    if clash := set(names).intersection(recipe.closed_form.preserve):
        raise RecipeError(f"recipe key closed_form.preserve: {sorted(clash)[0]!r} is also to be erased")
    edited, goal = last_states(base, names), last_states(base, [recipe.surrogate])
    kept = last_states(base, recipe.closed_form.preserve) if recipe.closed_form.preserve else edited[:0]
    for path, module in modules.items():
        if shape_of(module)[1] != edited.shape[1] or not weight_of(module).is_floating_point():
            raise RecipeError(
                f"method 'uce' cannot edit {path}: it takes {shape_of(module)[1]} numbers as "
                f"{weight_of(module).dtype}, the text encoder gives {edited.shape[1]}",
                mend="--method esd-x",
            )
    weights = {path: weight_of(module) for path, module in modules.items()}
    found = edit(weights, edited, goal.expand_as(edited), kept, recipe.closed_form.ridge)
    return {path: increment.to(device="cpu") for path, increment in found.items()}


def last_states(base: BaseModel, prompts: Sequence[str]) -> Tensor:
    """The text states (n, d_text) at each prompt's last token before the closing one: its last subject token's.

    The empty prompt has its first.
    """
    states = base.encode(prompts).states
    tokenizer = base.pipe.tokenizer
    ids = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length).input_ids
    last = torch.tensor([max(0, len(row) - 2) for row in ids], device=states.device)
    return states[torch.arange(len(prompts), device=states.device), last]
