"""Forecasts a training: its rows, their memory, and their time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isinf
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spm_hub.models.architectures import body_of, denoiser_of
from spm_hub.models.base_choice import BaseChoice
from spm_hub.models.mapped import mark_mapped
from spm_hub.models.placement import AUTO, choose_device, parse_dtype
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.loop.early_stopping import HELD_OUT_ROWS, held_out_recipe
from spm_hub.training.loop.fitting import memory_plan
from spm_hub.training.loop.run import Task
from spm_hub.training.memory import GIB, Split, room_on, whole_copy_without_values
from spm_hub.training.methods import find_method
from spm_hub.training.methods.method import compare_predictions
from spm_hub.training.neighbours import held_names, with_neighbours_recorded
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import members
from spm_hub.training.recipe.recipe import Recipe

_BACKWARD = 2.0
"""Passes that the gradient of a row takes, in forward passes; weights are frozen, so that it is rather less."""
_EFFICIENCY = 0.5
"""Speed of a denoiser against that of one product of large matrices."""
_TRIED = 1024  # side of these matrices


def rows_without_gradient(recipe: RecipeFields) -> int:
    """Return the rows that are predicted without gradient in the whole training of one concept, about.

    That is what the frozen base teaches, and every measurement of the reach.
    """
    measured = 0
    if recipe.stop.reach is not None:
        measured = _taught_rows(held_out_recipe(recipe)) + HELD_OUT_ROWS * (recipe.steps // recipe.stop.every)
    return _taught_rows(recipe) + measured


def _taught_rows(recipe: RecipeFields) -> int:
    x_t, anchored = recipe.x_t, recipe.anchoring.weight > 0
    per = recipe.anchoring.per_target if anchored else 0
    further = int(recipe.erase_from is not None or recipe.objective.positive is not None)
    if x_t.source == "trajectory":
        asked = 2 + int(recipe.surrogate != "") + further + (recipe.anchoring.offered if anchored else 0)
        return min(x_t.chunks, recipe.steps) * x_t.steps * x_t.trajectories * asked
    taught = recipe.steps * recipe.batch_size * (2 + further + per)
    if x_t.source == "q_sample":
        return min(x_t.chunks, recipe.steps) * x_t.steps * x_t.trajectories * 2 + taught
    return recipe.steps * recipe.batch_size * x_t.steps + taught


@dataclass(frozen=True)
class Forecast:
    """The rows, memory and time of a training.

    rows, kept, split: as in `Plan`.  steps, without: its steps, and its rows without gradient.  weights: bytes of the
    pipeline.  room: bytes that autograd may keep.  seconds: about; None where the device cannot be tried out.
    """

    concepts: tuple[str, ...]
    rows: int
    steps: int
    without: int
    weights: int
    room: float
    kept: int
    split: Split
    seconds: float | None

    def figures(self) -> dict[str, Any]:
        """Return the forecast as plain values; bytes and seconds are whole numbers."""
        return {
            "concepts": list(self.concepts), "rows": self.rows, "steps": self.steps, "rows_at_once": self.split.rows,
            "checkpointing": self.split.checkpointing, "rows_without_gradient": self.without,
            "weights_bytes": self.weights, "kept_bytes": self.kept,
            "room_bytes": None if isinf(self.room) else int(self.room),
            "seconds": None if self.seconds is None else round(self.seconds),
        }  # fmt: skip

    def describe(self) -> str:
        """Return the forecast in words."""
        at_once = "all at once" if self.split.rows is None else f"{self.split.rows} at once"
        again = ", blocks keep their inputs alone" if self.split.checkpointing else ""
        took = "" if self.seconds is None else f"; about {_duration(self.seconds)}"
        of = "" if isinf(self.room) else f" of {self.room / GIB:.2f}"
        return (
            f"{', '.join(self.concepts)}: {self.steps} steps of {self.rows} rows with gradient ({at_once}{again}), "
            f"{self.without} rows without; weights {self.weights / GIB:.2f} GiB, kept for gradients "
            f"{self.kept / GIB:.2f}{of} GiB{took}"
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def forecasts(plans: Sequence[Recipe], base: BaseChoice, memory: float | None) -> Iterator[Forecast | str]:
    """Yield what each run takes or, for a method without steps that compare predictions, a remark.

    The weights of a base that is not given as a pipeline stay in their files.
    memory: GiB that the training may use, weights included; None for what is free.
    Raises RecipeError where not even one row fits; ModelError and others as loading the base does.
    """
    pipe = base.pipe if base.pipe is not None else _opened_on_paper(base)
    device = choose_device(base.device) if base.pipe is None else next(denoiser_of(pipe).parameters()).device
    for plan in plans:
        method = find_method(plan.method)
        assert method is not None, "a recipe's method is known"
        if method.objective is None or method.trains is not compare_predictions:
            yield f"{plan.target}: {method.name} takes no steps that compare predictions, and is not forecast"
        if names := held_names(plan, recipe := with_neighbours_recorded(plan, pipe)):
            yield names
        if method.objective is None or method.trains is not compare_predictions:
            continue
        model = TeacherModel(pipe, plan.resolution)
        tasks = [Task(one, model, {}, None, None, memory, len(plan.together)) for one in members(recipe)]
        yield forecast(tasks, device, loaded=base.pipe is not None)


def _opened_on_paper(base: BaseChoice) -> DiffusionPipeline:
    """Return the base with its denoiser's weights in their file, and the precision that was asked for."""
    pipe = replace(base, device="cpu", dtype=None).open(for_gradients=True, mapped=True)
    if base.dtype not in (None, AUTO):
        mark_mapped(denoiser_of(pipe), parse_dtype(base.dtype))
    return pipe


def forecast(tasks: Sequence[Task], device: torch.device, *, loaded: bool) -> Forecast:
    """Return what the training of these concepts, all in one run, takes on `device`.

    loaded: whether the base's weights are there already. Raises RecipeError if not even one row fits.
    """
    first, base = tasks[0], tasks[0].base
    outline = whole_copy_without_values(body_of(base.denoiser)).to(base.dtype)
    operations, weights = _operations(outline, base), base.bytes_of_weights()
    room = room_on(device, first.memory, weights, loaded=loaded)
    plan = memory_plan(first, outline, float("inf") if room is None else room)
    steps, without = first.recipe.steps, sum(rows_without_gradient(one.recipe) for one in tasks)
    whole = without + plan.rows * steps * (plan.split.passes + _BACKWARD)
    rate = _speed(device, base.dtype)
    return Forecast(
        tuple(one.recipe.target for one in tasks), plan.rows, steps, without, weights, plan.room, plan.kept, plan.split,
        None if rate is None else whole * operations / (_EFFICIENCY * rate),
    )  # fmt: skip


def _operations(outline: nn.Module, base: TeacherModel) -> int:
    """Return the floating-point operations of one row."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        outline(**base.arguments_without_values(1))
    return counter.get_total_flops()


def _speed(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the floating-point operations in a second of a product of matrices, tried out."""
    try:
        left = torch.ones((_TRIED, _TRIED), device=device, dtype=dtype)
        multiply = partial(torch.mm, left, left)
        multiply().sum().item()
        begun, times = time.perf_counter(), 8
        for _ in range(times):
            product = multiply()
        product.sum().item()
    except RuntimeError:
        return None
    return times * 2 * _TRIED**3 / (time.perf_counter() - begun)
