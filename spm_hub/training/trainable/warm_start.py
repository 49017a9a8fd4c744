"""Begins a training with an existing eraser instead of nothing erased."""

from __future__ import annotations

import hashlib
from typing import TypeVar

import torch

from spm_hub.adapters.adapter import Adapter
from spm_hub.errors import RecipeError
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.trainable.trainable import Trainable

R = TypeVar("R", bound=RecipeFields)


def tensors_sha256(adapter: Adapter) -> str:
    """Return the sha256 of all tensors in the order of their names; it does not depend on the file."""
    whole = hashlib.sha256()
    for path in sorted(adapter.increments):
        for part, tensor in sorted(adapter.increments[path].tensors().items()):
            data = tensor.detach().cpu().contiguous()
            whole.update(f"{path} {part} {data.dtype} {tuple(data.shape)}\n".encode())
            whole.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def with_start_recorded(recipe: R, start: Adapter | None) -> R:
    """Return the recipe with the start's own name and the sha256 of its tensors.

    Raises RecipeError if an eraser is named and none given, or the other way round, or if the tensors differ from those
    that the recipe names.
    """
    if start is None or recipe.start_from is None:
        if (start is None) == (recipe.start_from is None):
            return recipe
        given = f"{start.name} was given" if start is not None else "no eraser was given"
        raise RecipeError(
            f"recipe key start_from is {recipe.start_from!r}, but {given} to begin with", mend="train(..., start=...)"
        )
    found = tensors_sha256(start)
    if recipe.start_sha256 not in (None, found):
        raise RecipeError(
            f"recipe key start_sha256 is {recipe.start_sha256}, the tensors of {start.source} have {found}",
            mend="the eraser that the recipe was made with, or drop start_sha256",
        )
    return recipe.model_copy(update={"start_from": start.name, "start_sha256": found})


def begin_with(trainable: Trainable, start: Adapter) -> None:
    """Set the trained parameters to the start's increments; modules without one stay at zero.

    A low-rank increment of a lower rank leaves the other ranks at zero. Raises RecipeError for a start with a module,
    a rank, a shape or a kind that is not trained; then nothing is set.
    """
    if unknown := sorted(set(start.increments) - set(trainable.paths)):
        raise RecipeError(
            f"start_from: {start.name} changes {unknown[0]}, which is not trained ({len(unknown)} such modules)",
            mend="--set increment.modules for the start's own choice",
        )
    values = {key: value.detach().clone() for key, value in trainable.state().items()}
    for path, increment in start.increments.items():
        values |= {key: value.detach().clone() for key, value in trainable.start_values(path, increment, start).items()}
    trainable.load_state(values)
