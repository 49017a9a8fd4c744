"""Increments that are computed at once, without a training loop. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spm_hub.io.progress import phase
from spm_hub.training.loop.run import Run, Task
from spm_hub.training.recipe.protected_prompts import protects
from spm_hub.training.trainable.trainable import Trainable

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.adapters.increments import Increment


class Solved(Trainable):
    """Increments that are known already: nothing is put into the denoiser, and nothing is trained."""

    def __init__(self, increments: Mapping[str, Increment]) -> None:
        self._increments, self.paths = increments, tuple(increments)

    def parameters(self, lr: float, scale: bool) -> list[dict[str, Any]]:
        """Return no groups."""
        return []

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Change nothing: the denoiser is the base at all times."""
        yield

    def increments(self) -> Mapping[str, Increment]:
        """Return the solution."""
        return self._increments

    def state(self) -> Mapping[str, Tensor]:
        """Return no parameters."""
        return {}

    def remove(self) -> None:
        """Change nothing: the denoiser carries nothing."""


class ClosedFormRun(Run):
    """A run that is finished when it begins."""

    def __init__(self, task: Task, increments: Mapping[str, Increment]) -> None:
        from spm_hub.training.protection import space_left

        self.recipe = task.recipe
        self.trainable = Solved(increments)
        self.space = space_left(task.recipe, task.base, task.modules) if protects(task.recipe) else None

    @property
    def finished(self) -> bool:
        """Always true."""
        return True

    def step(self, step: int) -> Mapping[str, float]:
        """Return no losses: the solution does not change."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: the solution is computed again in less time than it is read."""
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore nothing."""


@dataclass(frozen=True)
class ClosedForm:
    """Trains a method of one formula.

    solve: task -> increments by module path.
    """

    solve: Callable[[Task], Mapping[str, Increment]]

    def __call__(self, task: Task) -> Run:
        """Solve the task."""
        with phase("computing the closed form"):
            increments = self.solve(task)
        return ClosedFormRun(task, increments)
