"""The training loop: one recipe in, one adapter out; killed and resumed, it ends in the same bits."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from spm_hub.adapter import Adapter, increment_info
from spm_hub.architectures import family_of, fingerprint_of
from spm_hub.atomic import write_atomic
from spm_hub.errors import RecipeError, SpmHubError
from spm_hub.increments import Increment
from spm_hub.manifest import Base, Concept, GateDefaults, Manifest

from .adversary import Attacker, drift
from .anchors import AnchorSource
from .base import BaseModel
from .closed_form import solved
from .dense import DenseInjection
from .injection import Injection, Trainable
from .masks import MaskInjection
from .minimalist import MinimalistRun
from .objectives import objective as objective_of
from .objectives.base import Objective
from .prompts import PromptMaker, Words, vocabulary_words
from .recipe import Recipe
from .selection import selected
from .starting import begin_with, started
from .state import restore, tensors_of
from .steering import Steering
from .trajectories import StudentSource, TrajectorySource, generator_for

Progress = Callable[[int, int, dict[str, float]], None]
_CHECKPOINT = "training.safetensors"


class TrainingInterruptedError(SpmHubError):
    """Ctrl-C during training; the checkpoint is on disk when a folder for it was given."""

    exit_code = 130


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stands on disk. Its random state is its step: every draw is seeded by (seed, step)."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / _CHECKPOINT

    def write(self, recipe: Recipe, step: int, tensors: dict[str, Tensor]) -> None:
        metadata = {"recipe": recipe.model_dump_json(), "step": str(step)}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, save(contiguous, metadata))

    def read(self, recipe: Recipe) -> tuple[int, dict[str, Tensor]]:
        """The step reached and the tensors. Raises RecipeError when it belongs to another recipe."""
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
        return int(metadata["step"]), tensors

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


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
    """Trains one eraser on `pipe`, which is left as it was.

    progress: called with (steps done, steps in all, losses relative to the distance there was to go).
    checkpoint_dir: where the run is saved every `checkpoint_every` steps and at Ctrl-C; `resume` goes on from there,
    and the result is bit for bit that of an undisturbed run on the same machine.
    start: the eraser that the recipe's start_from names; whoever calls has to load it.
    on_step: called after each step; returning True ends the training there (for benchmarks).
    Raises TrainingInterruptedError, RecipeError, ModelError.
    """
    recipe = started(recipe, start)
    base = BaseModel(pipe, recipe.resolution)
    base.denoiser.requires_grad_(False)
    modules = selected(base.denoiser, recipe.increment.modules)
    if recipe.objective.name == "uce":
        return _adapter(recipe, base, solved(recipe, base, modules), revision)
    names = (recipe.target, *recipe.aliases)
    maker = PromptMaker(names, recipe.kind, Words.load(), vocabulary_words(pipe.tokenizer))
    anchors = AnchorSource(base, recipe.anchoring, recipe.target, maker)
    attacker = Attacker(recipe.adversary, base, recipe.seed) if recipe.adversary.steps else None
    checkpoint = Checkpoint(checkpoint_dir) if checkpoint_dir is not None else None
    injection: Trainable
    if recipe.increment.kind == "mask":
        injection = MaskInjection(base.denoiser, recipe.masks)
    elif recipe.increment.kind == "dense":
        injection = DenseInjection(modules)
    else:
        injection = Injection(base.denoiser, recipe.increment.rank, generator_for(recipe.seed, 2, 0), modules)
    try:
        run: _Run | MinimalistRun
        if isinstance(injection, MaskInjection):
            run = MinimalistRun(recipe, base, injection, maker)
        else:
            source: StudentSource | TrajectorySource
            if recipe.x_t.source == "student":
                source = StudentSource(base, recipe, maker, anchors, injection)
            else:
                source = TrajectorySource(base, recipe, maker, anchors)
            if start is not None:
                begin_with(injection, start)
            objective = objective_of(recipe.objective)
            run = _Run(recipe, base, injection, source, objective, attacker)
        first = 0
        if resume and checkpoint is not None and checkpoint.path.exists():
            first, tensors = checkpoint.read(recipe)
            run.load(tensors)
        done = first
        try:
            for step in range(first, recipe.steps):
                losses = run.step(step)
                done = step + 1
                if progress is not None:
                    progress(done, recipe.steps, losses)
                if checkpoint is not None and done % checkpoint_every == 0 and done < recipe.steps:
                    checkpoint.write(recipe, done, run.tensors())
                if on_step is not None and on_step(done, injection):
                    break
        except KeyboardInterrupt:
            if checkpoint is None or done == 0:
                raise TrainingInterruptedError(f"stopped at step {done} of {recipe.steps}; nothing was saved") from None
            checkpoint.write(recipe, done, run.tensors())
            raise TrainingInterruptedError(
                f"stopped at step {done} of {recipe.steps}; the run is saved in {checkpoint.folder}",
                mend="the same command with --resume",
            ) from None
        increments = injection.increments()
    finally:
        injection.remove()
    return _adapter(recipe, base, increments, revision)


def _adapter(recipe: Recipe, base: BaseModel, trained: Mapping[str, Increment], revision: str | None) -> Adapter:
    dtype = getattr(torch, recipe.increment.dtype)
    increments = {path: increment.to(dtype=dtype) for path, increment in trained.items()}
    return Adapter(_manifest(recipe, base, increments, revision), increments, f"trained on {recipe.model}")


class _Run:
    """The state that training changes: increments and optimiser."""

    def __init__(
        self,
        recipe: Recipe,
        base: BaseModel,
        injection: Trainable,
        source: StudentSource | TrajectorySource,
        objective: Objective,
        attacker: Attacker | None,
    ) -> None:
        self.recipe, self.base, self.injection, self.source = recipe, base, injection, source
        self.objective, self.attacker = objective, attacker
        self.held: dict[str, Tensor] = {}  # what the increments were when the adversary began, where that is asked for
        self.steering = Steering(recipe)
        lr = recipe.optimiser.lr
        groups = injection.groups(lr, recipe.optimiser.scale_lr)
        self.optimiser = torch.optim.AdamW(groups, lr=lr, weight_decay=recipe.optimiser.weight_decay)
        self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self.distance: Tensor | None = None

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the losses as shares of the distance the erasure has to go."""
        if isinstance(self.source, TrajectorySource):
            # Chunks are made of the frozen base, which the low-rank layers are off for.
            with self.injection.frozen():
                batch = self.source.batch(step)
        else:
            batch = self.source.batch(step)
        factor = self.recipe.learning_rate(step)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        attacked = self.attacker is not None and step >= self.recipe.adversary_from
        if self.attacker is not None and attacked:
            batch = self.attacker.harmed(batch, step)
        losses = self.objective.losses(self.base, batch)
        erase, anchor = losses.erase, losses.anchor
        # Relative losses mean the same on any base, whatever the scale of its predictions; AdamW does not mind.
        if self.distance is None:
            self.distance = losses.distance
        weight = self.steering.weight
        self.steering.note(step, float(erase.detach()), float(losses.distance), self.objective)
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.objective.loss(erase, anchor, weight)
        if attacked and self.recipe.adversary.hold:
            now = self.injection.state()
            self.held = self.held or {key: value.detach().clone() for key, value in now.items()}
            loss = loss + self.recipe.adversary.hold * drift(now, self.held)
        (loss / self.distance).backward()
        self.optimiser.step()
        return {"erase": float(erase.detach() / self.distance), "anchor": float(anchor.detach() / self.distance)}

    def tensors(self) -> dict[str, Tensor]:
        tensors = tensors_of(self.injection, self.optimiser)
        tensors |= {f"held.{key}": value for key, value in self.held.items()}
        if self.distance is not None:
            tensors["distance"] = self.distance
        tensors["steering"] = self.steering.state()
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        restore(self.injection, self.optimiser, tensors)
        held = (key for key in tensors if key.startswith("held."))
        self.held = {key.removeprefix("held."): tensors[key].to(self.base.device) for key in held}
        self.distance = tensors["distance"].to(self.base.device)
        self.steering.load(tensors["steering"])


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
        versions=versions(),
        gate=GateDefaults(strength=recipe.strength),
    )  # fmt: skip
