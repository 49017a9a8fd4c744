"""The base class of everything that is trained inside a denoiser. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from spm_hub.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.increments import Increment


class Trainable(ABC):
    """Trainable increments of a denoiser, in effect from construction until `remove`."""

    paths: tuple[str, ...] = ()
    """The dotted paths of the modules that are trained."""

    @abstractmethod
    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Return the optimiser's parameter groups; with `scale`, lr follows 1 / fan-in where that applies."""

    @abstractmethod
    def frozen(self) -> AbstractContextManager[None]:
        """Return a context in which the denoiser is the base again."""

    @abstractmethod
    def increments(self) -> Mapping[str, Increment]:
        """Return the increments trained so far, by module path, on the CPU."""

    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """Return the trained parameters by name, for checkpoints."""

    @abstractmethod
    def remove(self) -> None:
        """Restore the denoiser's own modules."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the parameters."""
        import torch

        with torch.no_grad():
            for key, parameter in self.state().items():
                parameter.copy_(state[key])

    def install(self) -> None:
        """Put the increments back in effect after `remove`. Raises RecipeError for a kind that cannot return."""
        raise RecipeError(f"{type(self).__name__} cannot be trained together with other concepts", mend=_SEPME)

    def project(self, projector: Tensor) -> None:
        """Project every change by `projector` (d_text, d_text). Raises RecipeError for a kind that cannot."""
        raise RecipeError(f"{type(self).__name__} cannot leave protected prompts alone", mend=_SEPME)

    def deltas(self) -> list[Tensor]:
        """Return the changes of all weights, with gradient. Raises RecipeError for a kind without them."""
        raise RecipeError(f"regulariser.l1 needs changes of weights, and {type(self).__name__} has none", mend=_LORA)

    def start_values(self, path: str, increment: Increment, start: Adapter) -> dict[str, Tensor]:
        """Return the parameters, by name, that make up `increment`, of the eraser `start`, at `path`.

        Raises RecipeError for an increment that this kind cannot hold.
        """
        raise RecipeError(f"start_from: {type(self).__name__} cannot begin with {start.name}", mend=_LORA)

    def conversion_error(self, increments: Mapping[str, Increment]) -> tuple[str, float] | None:
        """Return (kind, largest relative error of `increments`) where saving converts the kind; else None."""
        return None


_SEPME = "--method sepme"
_LORA = "--increment lora:4"


def misfit(start: Adapter, path: str, has: str, trained: str, mend: str | None) -> RecipeError:
    """Return the error for an eraser `start` whose increment at `path` does not fit the trained one."""
    return RecipeError(f"start_from: {start.name} has {has} at {path}, trained are {trained}", mend=mend)
