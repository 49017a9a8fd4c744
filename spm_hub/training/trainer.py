"""Trains recipes to adapters; a run that is killed and resumed ends in the same bits."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from torch import nn

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Base, Concept, Evaluation, GateDefaults, Manifest, Training
from spm_hub.errors import RegistryError, SpmHubError
from spm_hub.io.progress import phase
from spm_hub.models.architectures import denoiser_of, family_of, fingerprint_of
from spm_hub.training.base_model import TeacherModel
from spm_hub.training.loop.checkpoint import Checkpoint, base_stamp
from spm_hub.training.loop.determinism import deterministic, lacks_deterministic_kernel
from spm_hub.training.loop.run import Run, Task
from spm_hub.training.methods import find_method
from spm_hub.training.neighbours import with_neighbours_recorded
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.protected_prompts import members
from spm_hub.training.trainable.module_selection import select_modules
from spm_hub.training.trainable.warm_start import with_start_recorded

if TYPE_CHECKING:
    from spm_hub.training.loop.run import Snapshot

Progress = Callable[[int, int, dict[str, float]], None]
CONVERSION = "conversion"
"""The evaluation protocol for the exactness of increments that were converted from PEFT's."""


class TrainingInterruptedError(SpmHubError):
    """Ctrl-C during training; the message names the step that is on disk, and where."""

    exit_code = 130


class TrainingDivergedError(SpmHubError):
    """A loss or an increment is not finite; nothing is saved, and an earlier checkpoint stays as it is."""


def versions() -> dict[str, str]:
    """Return the versions that decide the bits of a trained adapter."""
    names = ("spm-hub", "torch", "diffusers", "peft", "transformers")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


@dataclass(frozen=True)
class _Loop:
    """Progress, checkpoints and stopping of a training; see `train`."""

    revision: str | None
    progress: Progress | None
    checkpoint: Checkpoint | None
    every: int
    resume: bool
    on_step: Callable[[int, Snapshot], bool] | None
    memory: float | None


def train(
    recipe: RecipeFields,
    *,
    pipe: DiffusionPipeline,
    revision: str | None = None,
    progress: Progress | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    start: Adapter | None = None,
    on_step: Callable[[int, Snapshot], bool] | None = None,
    memory: float | None = None,
) -> Adapter:
    """Train one eraser on `pipe`, which is restored; of several concepts, return the recipe's own.

    progress: called with (steps done, steps in all, figures): the losses relative to those before training, and
    "reached" and "goal" of `Run` where the method measures them.
    checkpoint_dir: where the run is saved every `checkpoint_every` steps, at Ctrl-C and at its end; `resume` goes on
    from there, and the result is bit for bit that of an undisturbed run on the same machine.
    start: the eraser that the recipe's start_from names; the caller has to load it.
    on_step: called after each step with its number and a function that returns the increments that would be saved then;
    returning True ends the training there.
    memory: GiB that the training may use, weights included; None for what is free. Where a batch needs more, its rows
    go through the denoiser in groups: the same gradient, to rounding.
    Raises TrainingInterruptedError, TrainingDivergedError, RecipeError, ModelError.
    """
    return train_together(
        recipe, pipe=pipe, revision=revision, progress=progress, checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every, resume=resume, start=start, on_step=on_step, memory=memory,
    )[0]  # fmt: skip


def train_together(
    recipe: RecipeFields,
    *,
    pipe: DiffusionPipeline,
    revision: str | None = None,
    progress: Progress | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    start: Adapter | None = None,
    on_step: Callable[[int, Snapshot], bool] | None = None,
    memory: float | None = None,
) -> tuple[Adapter, ...]:
    """Train as `train` does; return all erasers of the run, the recipe's own and those of `together`."""
    recipe = with_neighbours_recorded(with_start_recorded(recipe, start), pipe)
    checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, base_stamp(pipe))
    loop = _Loop(revision, progress, checkpoint, checkpoint_every, resume, on_step, memory)
    had_gradients = [name for name, parameter in denoiser_of(pipe).named_parameters() if parameter.requires_grad]
    try:
        try:
            with deterministic():
                return _train_all(recipe, pipe, loop, start)
        except RuntimeError as error:
            if not lacks_deterministic_kernel(error):
                raise
            warnings.warn(
                f"spm_hub: this model cannot be trained to the same bits twice on this GPU: {error}",
                UserWarning,
                stacklevel=2,
            )
        return _train_all(recipe, pipe, loop, start)
    except KeyboardInterrupt as interrupt:
        raise interrupted(interrupt, recipe, checkpoint) from None
    finally:
        for name in had_gradients:
            denoiser_of(pipe).get_parameter(name).requires_grad_(True)


def _train_all(
    recipe: RecipeFields, pipe: DiffusionPipeline, loop: _Loop, start: Adapter | None
) -> tuple[Adapter, ...]:
    """Train all concepts of the recipe; return the erasers of its target and of `together`, in this order."""
    method = find_method(recipe.method)
    assert method is not None, "a recipe's method is known"
    with phase("trying out the base"):
        base = TeacherModel(pipe, recipe.resolution)
    base.denoiser.requires_grad_(False)
    modules = select_modules(base.denoiser, recipe.increment.modules)
    runs: dict[str, Run] = {}
    try:
        for member in members(recipe):
            objective = None if method.objective is None else method.objective(member)
            task = Task(member, base, modules, objective, start, loop.memory, len(recipe.together))
            runs[member.target] = method.trains(task)
            if recipe.together:
                runs[member.target].trainable.remove()  # the next one has to find the denoiser bare
        run = method.joins(list(runs.values())) if recipe.together else runs[recipe.target]
        if not run.finished and loop.checkpoint is not None:
            loop.checkpoint.check_room()
        stopped = _take_steps(recipe, run, loop)
        records = {target: _training(one, run.taken, stopped=stopped) for target, one in runs.items()}
        with phase("finishing the increments"):
            trained = {target: one.increments() for target, one in runs.items()}
            converted = {target: _conversion(one, trained[target]) for target, one in runs.items()}
    finally:
        for one in runs.values():
            one.trainable.remove()
    wanted = [recipe.target, *(companion.target for companion in recipe.together)]
    with phase("finishing the increments"):
        return tuple(
            _adapter(runs[name], base, modules, trained[name], converted[name], records[name], loop.revision)
            for name in wanted
        )


def _take_steps(recipe: RecipeFields, run: Run, loop: _Loop) -> bool:
    """Take the steps that are left, and save the state; return whether `on_step` ended them early."""
    first, checkpoint = 0, loop.checkpoint
    if loop.resume and checkpoint is not None and checkpoint.path.exists():
        first, tensors = checkpoint.read(recipe)
        run.load(tensors)
    run.taken = first
    stopped = False
    try:
        for step in range(first, recipe.steps):
            if run.finished:
                break
            losses = dict(run.step(step))
            if not all(map(math.isfinite, losses.values())):
                raise _diverged(recipe, f"step {step + 1} of {recipe.steps} has a loss that is not a finite number")
            done = step + 1
            if loop.progress is not None:
                loop.progress(done, recipe.steps, losses | _figures(run))
            if checkpoint is not None and done % loop.every == 0 and done < recipe.steps:
                checkpoint.write(recipe, done, run.tensors())
            if loop.on_step is not None and loop.on_step(done, run.snapshot):
                stopped = done < recipe.steps
                break
        if checkpoint is not None and run.taken > first:
            # A registry may have no room for the result. If this folder has none either, the registry still may.
            with suppress(RegistryError):
                checkpoint.write(recipe, run.taken, run.tensors())
    except KeyboardInterrupt as interrupt:
        if checkpoint is not None and run.taken > first:
            try:
                checkpoint.write(recipe, run.taken, run.tensors())
            except RegistryError as error:
                raise interrupt from error
        raise
    return stopped


def interrupted(
    interrupt: KeyboardInterrupt, recipe: RecipeFields, checkpoint: Checkpoint | None
) -> TrainingInterruptedError:
    """Return the error for Ctrl-C during a training; it names the step that is on disk, if any."""
    stopped = "stopped" + next((f" while {note}" for note in getattr(interrupt, "__notes__", ())), "")
    if isinstance(interrupt.__cause__, SpmHubError):
        stopped += f" ({interrupt.__cause__.message})"
    done = None if checkpoint is None else checkpoint.steps(recipe)
    if checkpoint is None or done is None:
        return TrainingInterruptedError(
            f"{stopped}; nothing was saved: no step of {recipe.steps} is on disk", mend="the same command again"
        )
    return TrainingInterruptedError(
        f"{stopped}; step {done} of {recipe.steps} is saved in {checkpoint.folder}",
        mend="the same command with --resume, in Python resume=True",
    )


def _figures(run: Run) -> dict[str, float]:
    """Return what `run` has reached and aims at, where it measures them."""
    found = {"reached": run.reached, "goal": run.goal}
    return {key: value for key, value in found.items() if value is not None}


def _training(run: Run, steps: int, *, stopped: bool) -> Training:
    """Return how a run of `steps` steps ended, for its manifest."""
    if steps == 0:
        return Training(steps=0, planned=0, ended="closed form")
    return Training(
        steps=steps, planned=run.recipe.steps,
        ended="callback" if stopped else "early stop" if run.finished else "all steps",
        reached=run.reached, goal=run.goal,
    )  # fmt: skip


def _diverged(recipe: RecipeFields, what: str) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"training on {recipe.target!r} diverged: {what} (optimiser.lr {recipe.optimiser.lr:g}, anchoring.weight "
        f"{recipe.anchoring.weight:g}, x_t.guidance {list(recipe.x_t.guidance)}, in {recipe.increment.dtype})",
        mend=f"--set optimiser.lr={recipe.optimiser.lr / 10:g}, or --dtype float32 for a base in half precision",
    )


def _conversion(run: Run, trained: Mapping[str, Increment]) -> tuple[Evaluation, ...]:
    """Return how far the saved increments are from the trained ones, if saving converts them."""
    recipe = run.recipe
    measured = run.trainable.conversion_error(_rounded(recipe, trained))
    if measured is None:
        return ()
    kind, error = measured
    return (
        Evaluation(
            protocol=CONVERSION, base=recipe.model, subject=recipe.target, metric=f"relative_error_of_{kind}",
            value=error, samples=len(trained), seed=recipe.seed,
        ),
    )  # fmt: skip


def _rounded(recipe: RecipeFields, trained: Mapping[str, Increment]) -> dict[str, Increment]:
    dtype = getattr(torch, recipe.increment.dtype)
    return {path: increment.to(dtype=dtype) for path, increment in trained.items()}


def _adapter(
    run: Run,
    base: TeacherModel,
    modules: Mapping[str, nn.Module],
    trained: Mapping[str, Increment],
    converted: tuple[Evaluation, ...],
    training: Training,
    revision: str | None,
) -> Adapter:
    """Return the finished eraser of a run. Raises TrainingDivergedError if an increment is not finite."""
    recipe, space = run.recipe, run.space
    if space is not None and recipe.protection.separable:
        trained = space.projected(trained)
    increments = _rounded(recipe, trained)
    for path, increment in increments.items():
        if not all(bool(part.isfinite().all()) for part in increment.tensors().values()):
            raise _diverged(recipe, f"the increment at {path} is not finite")
    manifest = _manifest(recipe, base, increments, revision)
    manifest = manifest.model_copy(update={"evaluation": converted, "training": training})
    if space is not None:
        gate = manifest.gate.model_copy(update={"protected": space.exact})
        moved = space.measured(increments, modules, recipe)
        manifest = manifest.model_copy(update={"gate": gate, "evaluation": (*manifest.evaluation, *moved)})
    return Adapter(manifest, increments, f"trained on {recipe.model}")


def _manifest(
    recipe: RecipeFields, base: TeacherModel, increments: Mapping[str, Increment], revision: str | None
) -> Manifest:
    concept = Concept(target=recipe.target, aliases=recipe.aliases, surrogate=recipe.surrogate, kind=recipe.kind)
    return Manifest(
        name=recipe.slug,
        concept=concept,
        increment=increment_info(increments),
        base=Base(
            family=family_of(base.denoiser).name, id=recipe.model, revision=revision,
            fingerprint=fingerprint_of(base.denoiser),
        ),
        recipe=recipe.model_dump(mode="json"),
        versions={**versions(), **base_stamp(base.pipe)},
        gate=GateDefaults(strength=recipe.strength),
    )  # fmt: skip
