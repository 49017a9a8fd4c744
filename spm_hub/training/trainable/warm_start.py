"""Beginning with an eraser that is there already, in place of nothing erased."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, LowRank
from spm_hub.errors import RecipeError
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainable.dense import DenseInjection
from spm_hub.training.trainable.low_rank import Injection


def tensors_sha256(adapter: Adapter) -> str:
    """Of all tensors in the order of their names: the same for whatever file they are in."""
    whole = hashlib.sha256()
    for path in sorted(adapter.increments):
        for part, tensor in sorted(adapter.increments[path].tensors().items()):
            data = tensor.detach().cpu().contiguous()
            whole.update(f"{path} {part} {data.dtype} {tuple(data.shape)}\n".encode())
            whole.update(data.flatten().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def started(recipe: Recipe, start: Adapter | None) -> Recipe:
    """The recipe that says what it really begins with: the start's own name and the sha256 of its tensors.

    Raises RecipeError where one is named and none given or the other way round, or its tensors are not those named.
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


def begin_with(injection: Injection | DenseInjection, start: Adapter) -> None:
    """Set what is trained to the start's increments, exactly; modules that it has none for keep theirs, nothing.

    A low-rank increment of a lower rank leaves the other ranks at nothing. Raises RecipeError where the start has a
    module, a rank, a shape or a kind that is not trained, and then nothing is set.
    """
    state = injection.state()
    values: dict[str, Tensor] = {}
    if unknown := sorted(set(start.increments) - set(injection.paths)):
        raise RecipeError(
            f"start_from: {start.name} changes {unknown[0]}, which is not trained ({len(unknown)} such modules)",
            mend="--set increment.modules for the start's own choice",
        )
    for path, increment in start.increments.items():
        if isinstance(injection, Injection):
            if not isinstance(increment, LowRank):
                raise _misfit(start, path, f"a {increment.kind} increment", "low_rank ones", "--increment dense")
            down, up = state[f"{path}.down"].detach().clone(), state[f"{path}.up"].detach().clone()
            rank = increment.rank
            if rank > len(down) or increment.weight_shape != _weight_shape(down, up):
                told = f"rank {rank} for a weight {increment.weight_shape}"
                trained = f"rank {len(down)} for {_weight_shape(down, up)}"
                raise _misfit(start, path, told, trained, f"--increment lora:{rank}")
            down[:rank] = increment.down.view_as(down[:rank])
            up[:, :rank] = increment.up.view_as(up[:, :rank])
            values |= {f"{path}.down": down, f"{path}.up": up}
        else:
            delta = state[f"{path}.delta"]
            if isinstance(increment, LowRank) and increment.weight_shape == tuple(delta.shape):
                values[f"{path}.delta"] = increment.delta_for(delta.detach().cpu())
            elif isinstance(increment, Dense) and increment.delta.shape == delta.shape:
                values[f"{path}.delta"] = increment.delta
                if increment.delta_bias is not None:
                    values[f"{path}.delta_bias"] = increment.delta_bias
            else:
                raise _misfit(start, path, f"a {increment.kind} increment", f"a dense {tuple(delta.shape)}", None)
    if extra := sorted(values.keys() - state.keys()):
        raise _misfit(start, extra[0], "something", "only " + ", ".join(part for part in state if part in values), None)
    injection.load_state({**{key: value.detach().clone() for key, value in state.items()}, **values})


def _weight_shape(down: Tensor, up: Tensor) -> tuple[int, ...]:
    return len(up), *down.shape[1:]


def _misfit(start: Adapter, path: str, has: str, trained: str, mend: str | None) -> RecipeError:
    return RecipeError(f"start_from: {start.name} has {has} at {path}, trained are {trained}", mend=mend)
