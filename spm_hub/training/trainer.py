"""The training loop: one recipe in, one adapter out; killed and resumed, it ends in the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.models.architectures import denoiser_of, family_of, fingerprint_of
from spm_hub.io.atomic import write_atomic
from spm_hub.errors import RecipeError, RegistryError, SpmHubError
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Base, Concept, Evaluation, GateDefaults, Manifest

from spm_hub.training.base_model import BaseModel
from spm_hub.training.closed_form import solved
from spm_hub.training.trainable.low_rank import Trainable
from spm_hub.training.trainable.mask import MaskInjection
from spm_hub.training.loop.mask_run import MinimalistRun
from spm_hub.training.trainable.peft import PeftInjection
from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words
from spm_hub.training.protection import Space, space_left
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.loop.determinism import repeatable, without_repeatable_kernel
from spm_hub.training.loop.prediction_run import Run
from spm_hub.training.trainable.module_selection import selected
from spm_hub.training.recipe.protected_prompts import members, protects
from spm_hub.training.trainable.warm_start import started
from spm_hub.training.loop.joint_run import Together

Progress = Callable[[int, int, dict[str, float]], None]
_CHECKPOINT = "training.safetensors"
_SAMPLED = 16  # numbers of a parameter, or a few more
CONVERSION = "conversion"
"""The protocol by which a manifest tells how exactly what PEFT trained was turned into increments."""


class TrainingInterruptedError(SpmHubError):
    """Ctrl-C during training; the checkpoint is on disk when a folder for it was given."""

    exit_code = 130


class TrainingDivergedError(SpmHubError):
    """Numbers left what floats can hold; nothing of it is saved, and an earlier checkpoint stays as it is."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands on disk. Its random state is its step: every draw is seeded by (seed, step).

    base: what `base_stamp` says of the model that it trains on.
    """

    folder: Path
    base: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.folder / _CHECKPOINT

    def write(self, recipe: Recipe, step: int, tensors: dict[str, Tensor]) -> None:
        metadata = {"recipe": recipe.model_dump_json(), "step": str(step), **self.base}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(self.path, save(contiguous, metadata))

    def check_room(self) -> None:
        """Asked before a training and not after it. Raises RegistryError where the folder cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise RegistryError(
                f"the state of the run cannot be kept in {self.folder}: {error.strerror}",
                mend="name another folder with --checkpoint-dir DIR",
            ) from error

    def read(self, recipe: Recipe) -> tuple[int, dict[str, Tensor]]:
        """The step reached and the tensors. Raises RecipeError when it belongs to another recipe or another base."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except Exception as error:  # safetensors raises its own type for damage of any kind
            raise SpmHubError(
                f"the checkpoint {self.path} cannot be read: {error}", mend="train again without --resume"
            ) from None
        if json.loads(metadata.get("recipe", "{}")) != recipe.model_dump(mode="json"):
            raise RecipeError(
                f"the checkpoint {self.path} belongs to another recipe",
                mend="resume with the recipe it was started with, or train again without --resume",
            )
        for key, value in self.base.items():
            if (then := metadata.get(key, "unknown")) != value:
                raise RecipeError(
                    f"the checkpoint {self.path} belongs to another base: its {key} is {then}, that of this one is "
                    f"{value}",
                    mend="resume with the --model and --dtype it was started with, or train again without --resume",
                )
        return int(metadata["step"]), tensors

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def base_stamp(pipe: DiffusionPipeline) -> dict[str, str]:
    """What tells a base from another one of its name: its precision, and a hash of some numbers of every parameter."""
    whole = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            whole.update(f"{part} {name} {tuple(parameter.shape)}\n".encode())
            # Quantised by a subclass, or left on the disk, weights are not there to be read; norms and biases are.
            if type(parameter.data) is Tensor and not parameter.is_meta:
                flat = parameter.detach().flatten()
                some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
                whole.update(some.view(torch.uint8).numpy().tobytes())
    precision = str(next(denoiser_of(pipe).parameters()).dtype).removeprefix("torch.")
    return {"base-dtype": precision, "base-weights": whole.hexdigest()[:16]}


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
                mend="the same command with --resume",
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
