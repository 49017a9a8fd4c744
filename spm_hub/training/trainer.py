"""The training loop: one recipe in, one adapter out; killed and resumed, it ends in the same bits."""

from __future__ import annotations

import math
import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Base, Concept, Evaluation, GateDefaults, Manifest
from spm_hub.errors import RegistryError, SpmHubError
from spm_hub.models.architectures import denoiser_of, family_of, fingerprint_of
from spm_hub.training.base_model import BaseModel
from spm_hub.training.closed_form import solved
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.loop.checkpoint import Checkpoint, base_stamp
from spm_hub.training.loop.determinism import repeatable, without_repeatable_kernel
from spm_hub.training.loop.joint_run import Together
from spm_hub.training.loop.mask_run import MinimalistRun
from spm_hub.training.loop.prediction_run import Run
from spm_hub.training.protection import Space, space_left
from spm_hub.training.recipe.protected_prompts import members, protects
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainable.low_rank import Trainable
from spm_hub.training.trainable.mask import MaskInjection
from spm_hub.training.trainable.module_selection import selected
from spm_hub.training.trainable.peft import PeftInjection
from spm_hub.training.trainable.warm_start import started

Progress = Callable[[int, int, dict[str, float]], None]
CONVERSION = "conversion"
"""The protocol by which a manifest tells how exactly what PEFT trained was turned into increments."""


class TrainingInterruptedError(SpmHubError):
    """Ctrl-C during training; the checkpoint is on disk when a folder for it was given."""

    exit_code = 130


class TrainingDivergedError(SpmHubError):
    """Numbers left what floats can hold; nothing of it is saved, and an earlier checkpoint stays as it is."""


def versions() -> dict[str, str]:
    """Versions that decide the bits of a trained adapter."""
    names = ("spm-hub", "torch", "diffusers", "peft", "transformers")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def train(
    recipe: Recipe,
    *,
    pipe: DiffusionPipeline,
    revision: str | None = None,
    progress: Progress | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    start: Adapter | None = None,
    on_step: Callable[[int, Trainable], bool] | None = None,
) -> Adapter:
    """Trains one eraser on `pipe`, which is left as it was; of a recipe with `together`, that of its own target.

    progress: called with (steps done, steps in all, losses relative to the distance there was to go).
    checkpoint_dir: where the run is saved every `checkpoint_every` steps, at Ctrl-C and at its end; `resume` goes on
    from there, and the result is bit for bit that of an undisturbed run on the same machine.
    start: the eraser that the recipe's start_from names; whoever calls has to load it.
    on_step: called after each step; returning True ends the training there (for benchmarks).
    Raises TrainingInterruptedError, TrainingDivergedError, RecipeError, ModelError.
    """
    return train_together(
        recipe, pipe=pipe, revision=revision, progress=progress, checkpoint_dir=checkpoint_dir,
        checkpoint_every=checkpoint_every, resume=resume, start=start, on_step=on_step,
    )[0]  # fmt: skip


def train_together(
    recipe: Recipe,
    *,
    pipe: DiffusionPipeline,
    revision: str | None = None,
    progress: Progress | None = None,
    checkpoint_dir: Path | None = None,
    checkpoint_every: int = 50,
    resume: bool = False,
    start: Adapter | None = None,
    on_step: Callable[[int, Trainable], bool] | None = None,
) -> tuple[Adapter, ...]:
    """As `train`, all erasers of the run: that of the recipe's own target, then those of `together`."""
    options = (revision, progress, checkpoint_dir, checkpoint_every, resume, start, on_step)
    trainable = [name for name, parameter in denoiser_of(pipe).named_parameters() if parameter.requires_grad]
    try:
        try:
            with repeatable():
                return _trained(recipe, pipe, *options)
        except RuntimeError as error:
            if not without_repeatable_kernel(error):
                raise
            warnings.warn(
                f"spm_hub: this model cannot be trained to the same bits twice on this GPU: {error}",
                UserWarning,
                stacklevel=2,
            )
        return _trained(recipe, pipe, *options)
    finally:
        for name in trainable:
            denoiser_of(pipe).get_parameter(name).requires_grad_(True)


def _trained(
    recipe: Recipe,
    pipe: DiffusionPipeline,
    revision: str | None,
    progress: Progress | None,
    checkpoint_dir: Path | None,
    checkpoint_every: int,
    resume: bool,
    start: Adapter | None,
    on_step: Callable[[int, Trainable], bool] | None,
) -> tuple[Adapter, ...]:
    recipe = started(recipe, start)
    base = BaseModel(pipe, recipe.resolution)
    base.denoiser.requires_grad_(False)
    modules = selected(base.denoiser, recipe.increment.modules)
    if recipe.objective.name == "uce":
        shares = {member.target: member for member in members(recipe)}
        return tuple(
            _adapter(member, base, solved(member, base, modules), revision, modules, _space(member, base, modules))
            for member in (shares[name] for name in _wanted(recipe))
        )
    checkpoint = Checkpoint(checkpoint_dir, base_stamp(pipe)) if checkpoint_dir is not None else None
    if checkpoint is not None:
        checkpoint.check_room()
    runs: dict[str, Run | MinimalistRun] = {}
    try:
        for member in members(recipe):
            names = (member.target, *member.aliases)
            maker = PromptMaker(names, member.kind, Words.load(), vocabulary_words(pipe.tokenizer))
            if member.increment.kind == "mask":
                runs[member.target] = MinimalistRun(member, base, MaskInjection(base.denoiser, member.masks), maker)
            else:
                runs[member.target] = Run(member, base, modules, maker, start)
            if recipe.together:
                runs[member.target].injection.remove()  # the next one has to find the denoiser bare
        run: Run | MinimalistRun | Together = runs[recipe.target]
        if recipe.together:
            run = Together([one for one in runs.values() if isinstance(one, Run)])
        first = 0
        if resume and checkpoint is not None and checkpoint.path.exists():
            first, tensors = checkpoint.read(recipe)
            run.load(tensors)
        run.taken = first
        try:
            for step in range(first, recipe.steps):
                if run.finished:
                    break
                losses = run.step(step)
                if not all(map(math.isfinite, losses.values())):
                    raise _diverged(recipe, f"step {step + 1} of {recipe.steps} has a loss that is no finite number")
                done = step + 1
                if progress is not None:
                    progress(done, recipe.steps, losses)
                if checkpoint is not None and done % checkpoint_every == 0 and done < recipe.steps:
                    checkpoint.write(recipe, done, run.tensors())
                if on_step is not None and on_step(done, runs[recipe.target].injection):
                    break
            if checkpoint is not None and run.taken > first:
                # What is trained may yet find no room in a registry. Where this finds none either, that still may.
                with suppress(RegistryError):
                    checkpoint.write(recipe, run.taken, run.tensors())
        except KeyboardInterrupt:
            done = run.taken
            if checkpoint is None or done == 0:
                raise TrainingInterruptedError(f"stopped at step {done} of {recipe.steps}; nothing was saved") from None
            checkpoint.write(recipe, done, run.tensors())
            raise TrainingInterruptedError(
                f"stopped at step {done} of {recipe.steps}; the run is saved in {checkpoint.folder}",
                mend="the same command with --resume, in Python resume=True",
            ) from None
        for one in runs.values():
            if isinstance(one, Run):
                one.settle()
        trained = {target: one.injection.increments() for target, one in runs.items()}
        converted = {
            target: _conversion(one.recipe, one.injection, trained[target])
            for target, one in runs.items()
            if isinstance(one.injection, PeftInjection)
        }
    finally:
        for one in runs.values():
            one.injection.remove()
    return tuple(
        _adapter(runs[name].recipe, base, trained[name], revision, modules, runs[name].space, converted.get(name))
        for name in _wanted(recipe)
    )


def _diverged(recipe: Recipe, what: str) -> TrainingDivergedError:
    return TrainingDivergedError(
        f"training on {recipe.target!r} diverged: {what} (optimiser.lr {recipe.optimiser.lr:g}, anchoring.weight "
        f"{recipe.anchoring.weight:g}, x_t.guidance {list(recipe.x_t.guidance)}, in {recipe.increment.dtype})",
        mend=f"--set optimiser.lr={recipe.optimiser.lr / 10:g}, or --dtype float32 for a base in half precision",
    )


def _wanted(recipe: Recipe) -> list[str]:
    return [recipe.target, *(companion.target for companion in recipe.together)]


def _space(recipe: Recipe, base: BaseModel, modules: Mapping[str, nn.Module]) -> Space | None:
    return space_left(recipe, base, modules) if protects(recipe) else None


def _conversion(recipe: Recipe, injection: PeftInjection, trained: Mapping[str, Increment]) -> Evaluation:
    """How far what is saved is from what PEFT trained."""
    return Evaluation(
        protocol=CONVERSION, base=recipe.model, subject=recipe.target,
        metric=f"relative_error_of_{injection.kind}",
        value=injection.conversion_error(_rounded(recipe, trained)), samples=len(trained), seed=recipe.seed,
    )  # fmt: skip


def _rounded(recipe: Recipe, trained: Mapping[str, Increment]) -> dict[str, Increment]:
    dtype = getattr(torch, recipe.increment.dtype)
    return {path: increment.to(dtype=dtype) for path, increment in trained.items()}


def _adapter(
    recipe: Recipe,
    base: BaseModel,
    trained: Mapping[str, Increment],
    revision: str | None,
    modules: Mapping[str, nn.Module],
    space: Space | None,
    converted: Evaluation | None = None,
) -> Adapter:
    if space is not None and recipe.protection.separable:
        trained = space.projected(trained)
    increments = _rounded(recipe, trained)
    for path, increment in increments.items():
        if not all(bool(part.isfinite().all()) for part in increment.tensors().values()):
            raise _diverged(recipe, f"the increment at {path} is not finite")
    manifest = _manifest(recipe, base, increments, revision)
    if converted is not None:
        manifest = manifest.model_copy(update={"evaluation": (converted,)})
    if space is not None:
        gate = manifest.gate.model_copy(update={"protected": space.exact})
        moved = space.measured(increments, modules, recipe)
        manifest = manifest.model_copy(update={"gate": gate, "evaluation": (*manifest.evaluation, *moved)})
    return Adapter(manifest, increments, f"trained on {recipe.model}")


def _manifest(recipe: Recipe, base: BaseModel, increments: Mapping[str, Increment], revision: str | None) -> Manifest:
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
