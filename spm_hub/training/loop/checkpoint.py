"""Saves the state of a training run, and computes the stamp that identifies its base model."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from spm_hub.errors import RecipeError, RegistryError, SpmHubError
from spm_hub.io.atomic import write_atomic
from spm_hub.models.architectures import denoiser_of
from spm_hub.models.mapped import intended_dtype, is_mapped
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.trainable.trainable import Trainable

_CHECKPOINT = "training.safetensors"


_SAMPLED = 16  # numbers of a parameter, or a few more


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run on disk. No random state is saved: every draw is seeded by (seed, step).

    base: the `base_stamp` of the model that the run trains on.
    """

    folder: Path
    base: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.folder / _CHECKPOINT

    def write(self, recipe: RecipeFields, step: int, tensors: dict[str, Tensor]) -> None:
        metadata = {"recipe": recipe.model_dump_json(), "step": str(step), **self.base}
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_atomic(self.path, save(contiguous, metadata))

    def check_room(self) -> None:
        """Raise RegistryError if the folder cannot be written. Called before a training, not after it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise RegistryError(
                f"the state of the run cannot be kept in {self.folder}: {error.strerror}",
                mend="name another folder with --checkpoint-dir DIR, in Python checkpoint_dir=DIR",
            ) from error

    def read(self, recipe: RecipeFields) -> tuple[int, dict[str, Tensor]]:
        """Return the steps taken and the tensors. Raises RecipeError if recipe or base differ."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        except Exception as error:  # safetensors raises its own type for damage of any kind
            raise SpmHubError(
                f"the checkpoint {self.path} cannot be read: {error}", mend="train again without --resume"
            ) from None
        if not _is_same(metadata.get("recipe", "{}"), recipe):
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

    def steps(self, recipe: RecipeFields) -> int | None:
        """Return the steps that the state on disk includes; None without a state of this recipe on this base."""
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
        except Exception:  # as in `read`
            return None
        same = _is_same(metadata.get("recipe", "{}"), recipe) and self.base.items() <= metadata.items()
        return int(metadata["step"]) if same else None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _is_same(dumped: str, recipe: RecipeFields) -> bool:
    """Return whether `dumped`, JSON that an earlier version may have written, is this recipe."""
    try:
        return type(recipe).model_validate(json.loads(dumped)) == recipe
    except ValueError:
        return False


def base_stamp(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return a base's precision, and a hash of some numbers of every parameter.

    It differs between two bases of the same name.
    """
    whole = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, parameter in module.named_parameters() if isinstance(module, nn.Module) else ():
            whole.update(f"{part} {name} {tuple(parameter.shape)}\n".encode())
            # Quantised by a subclass, or left on the disk, weights are not there to be read; norms and biases are.
            if type(parameter.data) is Tensor and not parameter.is_meta:
                flat = parameter.detach().flatten()
                some = flat[:: max(1, len(flat) // _SAMPLED)].cpu().contiguous()
                some = some.to(intended_dtype(module)) if is_mapped(module) else some
                whole.update(some.view(torch.uint8).numpy().tobytes())
    precision = str(intended_dtype(denoiser_of(pipe))).removeprefix("torch.")
    return {"base-dtype": precision, "base-weights": whole.hexdigest()[:16]}


_ADAM = ("step", "exp_avg", "exp_avg_sq")


def tensors_of(trainable: Trainable, optimiser: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the parameters and AdamW's state by name.

    Call it after the first step; parameters without a gradient have no state.
    """
    tensors: dict[str, Tensor] = {}
    for key, parameter in trainable.state().items():
        tensors[f"increment.{key}"] = parameter
        if known := optimiser.state.get(parameter):
            tensors |= {f"optimiser.{name}.{key}": known[name] for name in _ADAM}
    return tensors


def restore(trainable: Trainable, optimiser: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Restore the state that `tensors_of` returned."""
    parameters = trainable.state()
    trainable.load_state({key: tensors[f"increment.{key}"] for key in parameters})
    for key, parameter in parameters.items():
        for name in _ADAM if f"optimiser.step.{key}" in tensors else ():
            value = tensors[f"optimiser.{name}.{key}"]
            optimiser.state[parameter][name] = value if name == "step" else value.to(parameter.device)
