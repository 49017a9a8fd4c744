"""Fits the rows of a training's steps into the memory there is."""

from __future__ import annotations

import torch
from torch import nn

from spm_hub.models.architectures import body_of
from spm_hub.training.loop.run import Task
from spm_hub.training.memory import (
    Plan,
    Split,
    fitted,
    is_small,
    kept_by_one_row,
    room_on,
    whole_copy_without_values,
)
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.trainable.kinds import make_trainable
from spm_hub.training.trainable.module_selection import select_modules


def rows_with_gradient(recipe: RecipeFields) -> int:
    """Return the rows of one step of one concept: the concept's, anchors' and the empty prompt's."""
    size, anchored = recipe.batch_size, recipe.anchoring.weight > 0
    per = recipe.anchoring.per_target if anchored else 0
    if not anchored or recipe.x_t.source != "trajectory":
        return size * (1 + per)
    # Of the first group of trajectories alone, later of two groups, half of the batch each.
    shares = [[size], [size // 2, size - size // 2]][: min(recipe.x_t.chunks, recipe.steps)]
    return size * (1 + per) + max(sum(max(1, one // 4) for one in some if one) for some in shares)


def memory_plan(task: Task, outline: nn.Module, room: float) -> Plan:
    """Return how the rows of a step fit into `room` bytes.

    outline: a copy of the bare denoiser without values; the recipe's increment is put into it.
    Raises RecipeError if not even one row fits.
    """
    recipe, base = task.recipe, task.base
    modules = select_modules(outline, recipe.increment.modules)
    basis = torch.eye(base.encode(["a"]).shape[-1]) if recipe.increment.kind == "null_space" else None
    make_trainable(recipe.increment, outline, modules, torch.Generator(), basis)
    arguments = base.arguments_without_values(1)

    def count(checkpointing: bool) -> int:
        return kept_by_one_row(outline, arguments, checkpointing=checkpointing)

    side = "" if recipe.resolution is None else f" at {recipe.resolution} pixels"
    rows = rows_with_gradient(recipe) * (1 + task.beside)
    return fitted(rows, room, count, f"{type(outline).__name__}{side} in {base.dtype}".replace("torch.", ""))


def split_for(task: Task) -> Split:
    """Return how a batch has to go through the denoiser to fit into the memory there is.

    Small denoisers, and devices that do not tell what is free, get all rows at once. Raises RecipeError as
    `memory_plan` does.
    """
    denoiser = body_of(task.base.denoiser)
    room = room_on(task.base.device, task.memory, task.base.bytes_of_weights(), loaded=True)
    if room is None or (task.memory is None and is_small(denoiser)):
        return Split()
    return memory_plan(task, whole_copy_without_values(denoiser), room).split
