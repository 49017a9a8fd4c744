"""Builds the trainable of a recipe's `increment`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from spm_hub.errors import RecipeError
from spm_hub.training.recipe.schema import IncrementRecipe
from spm_hub.training.trainable.dense import TrainableDense
from spm_hub.training.trainable.low_rank import TrainableLowRank
from spm_hub.training.trainable.null_space import TrainableNullSpace
from spm_hub.training.trainable.peft import TrainablePeft
from spm_hub.training.trainable.trainable import Trainable


def make_trainable(
    increment: IncrementRecipe,
    denoiser: nn.Module,
    modules: Mapping[str, nn.Module],
    generator: torch.Generator,
    basis: Tensor | None,
) -> Trainable:
    """Return the trainable of `increment` on `modules`, in effect.

    basis: S (k, d_text), the null space of the protected prompts; None if no prompt is protected.
    Raises RecipeError for a kind that changes no weights, ModelError for a denoiser that cannot carry the kind.
    """
    match increment.kind:
        case "low_rank":
            return TrainableLowRank(denoiser, increment.rank, generator, modules)
        case "dense":
            return TrainableDense(modules)
        case "null_space" if basis is not None:
            return TrainableNullSpace(modules, basis, increment.beta)
        case "loha" | "lokr" | "vera" | "dora" as kind:
            return TrainablePeft(denoiser, kind, increment.rank, generator, modules)
        case _:
            raise RecipeError(
                f"recipe key increment.kind: {increment.kind!r} cannot be trained by comparing predictions",
                mend="--increment lora:4",
            )
