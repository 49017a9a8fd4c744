"""The interface of a training loop: a task in, and a run out that steps and saves its state.

Importing it imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.increments import Increment
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.prompts import PromptMaker
    from spm_hub.training.objective import Objective
    from spm_hub.training.protection import Space
    from spm_hub.training.recipe.fields import RecipeFields
    from spm_hub.training.trainable.trainable import Trainable

    Snapshot = Callable[[], Mapping[str, Increment]]
    """A function that returns the increments of a training as they would be saved when it is called."""


@dataclass(frozen=True, eq=False)
class Task:
    """Everything that a method needs to make one eraser.

    modules: those of `increment.modules`, by path.  objective: the method's, None if it has none.  start: the eraser
    that the training begins with, None for nothing erased.  memory: GiB that the training may use, weights included;
    None for what is free.  beside: other concepts that take their steps in the same run.
    """

    recipe: RecipeFields
    base: TeacherModel
    modules: Mapping[str, nn.Module]
    objective: Objective | None = None
    start: Adapter | None = None
    memory: float | None = None
    beside: int = 0

    @cached_property
    def prompts(self) -> PromptMaker:
        """The maker of prompts about the concept, and about everything else."""
        from spm_hub.training.data.prompts import PromptMaker, Words, vocabulary_words

        recipe, vocabulary = self.recipe, vocabulary_words(self.base.pipe.tokenizer)
        return PromptMaker((recipe.target, *recipe.aliases), recipe.kind, Words.load(), vocabulary)


class Run(ABC):
    """One eraser in the making: a trainable, and all other state that training changes.

    Every random draw has to be a function of (recipe, step), and everything else that a step changes has to be in
    `tensors`: then a run that is killed and resumed ends in the same bits.
    """

    recipe: RecipeFields
    trainable: Trainable
    space: Space | None = None
    """The directions that protected prompts leave to the increment; None if no prompt is protected."""
    taken: int = 0
    """The number of steps that the state includes. `step` sets it together with the state (`delay_interrupts`)."""

    @property
    def finished(self) -> bool:
        """True if no further step is needed."""
        return False

    @property
    def reached(self) -> float | None:
        """The share of the way from the concept to its surrogate that is gone, averaged over the last steps.

        None before the first step, and for a run that does not measure it.
        """
        return None

    @property
    def goal(self) -> float | None:
        """The share of the way that the training aims at; None if it has no such aim."""
        return None

    @abstractmethod
    def step(self, step: int) -> Mapping[str, float]:
        """Take one step (from 0) and set `taken`; return losses by name, as shares of those before training."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return all state by name, for checkpoints."""

    @abstractmethod
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""

    def increments(self) -> Mapping[str, Increment]:
        """Return the increments to save, by module path."""
        return self.trainable.increments()

    def snapshot(self) -> Mapping[str, Increment]:
        """Return a copy of the increments that would be saved now; the training may go on."""
        return self.trainable.increments()
