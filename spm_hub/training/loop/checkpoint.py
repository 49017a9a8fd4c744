"""The state of a training run on disk, and what tells one base model from another."""

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
from spm_hub.training.recipe.recipe import Recipe

_CHECKPOINT = "training.safetensors"


_SAMPLED = 16  # numbers of a parameter, or a few more


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
                mend="name another folder with --checkpoint-dir DIR, in Python checkpoint_dir=DIR",
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
