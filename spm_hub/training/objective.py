"""The base classes of objectives, which move a concept's prediction away from the base's own.

Importing them imports no torch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.batch import Batch


@dataclass(frozen=True, eq=False)
class Losses:
    """The scalar losses of one batch.

    erase; anchor, 0 without anchors; distance, the value of `erase` before training.
    left: of an erase loss that does not fall to 0, the part of it that does, from `distance` on; None where it is
    `erase` itself.
    """

    erase: Tensor
    anchor: Tensor
    distance: Tensor
    left: Tensor | None = None


class Objective(ABC):
    """A loss on predictions, all of them (n, *latent_shape).

    `concept` is the frozen base's prediction for the prompt that is trained on, `neutral` the one without the concept.
    """

    relative: ClassVar[bool] = True
    """Whether its loss is minimised as a share of `distance`, so that one rate fits every base."""

    measures_distance: ClassVar[bool] = True
    """Whether `distance` is measured for every batch; else only that of the first batch is `erase` before training."""

    by_row: ClassVar[bool] = True
    """Whether it reads predictions alone, so that rows may be predicted one group after the other."""

    @property
    @abstractmethod
    def push(self) -> float:
        """The distance of the target beyond `neutral`, in distances between `concept` and `neutral`."""

    @abstractmethod
    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """Return the prediction that the loss pulls to."""

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
        """Return the losses of the model being erased on one batch, with gradients.

        An objective that needs more than a batch's predictions overrides it.
        """
        prediction, anchors = self.predicted(base, batch)
        return Losses(
            self.erase(prediction, batch.concept, batch.neutral),
            self.anchor(anchors, batch.anchor_predictions) if len(anchors) else anchors.new_zeros(()),
            self.distance(batch.concept, batch.neutral),
        )

    def predicted(self, base: TeacherModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """Its predictions for a batch's target rows and anchor rows, in one call of the denoiser."""
        import torch

        from spm_hub.training.conditioning import Conditioning

        latents = torch.cat([batch.latents, batch.anchor_latents])
        times = torch.cat([batch.times, batch.anchor_times])
        prediction = base.predict(latents, times, Conditioning.cat([batch.states, batch.anchor_states]))
        return prediction[: len(batch.latents)], prediction[len(batch.latents) :]

    def erase(self, prediction: Tensor, concept: Tensor, neutral: Tensor) -> Tensor:
        """The mean over all elements of (eps(x_t, c) - target)^2."""
        return (prediction - self.target(concept, neutral)).pow(2).mean()

    def anchor(self, prediction: Tensor, kept: Tensor) -> Tensor:
        """SPM's Eq. 7 without its lambda: the mean of (eps(x_t, c~) - eps*(x_t, c~))^2 over the anchors."""
        return (prediction - kept).pow(2).mean()

    def loss(self, erase: Tensor, anchor: Tensor, weight: float) -> Tensor:
        """SPM's Eq. 8: L_era + lambda L_anc."""
        return erase + weight * anchor

    def distance(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """Return `erase` before training: the whole way from the concept's prediction to the target."""
        return (1 + self.push) ** 2 * (concept - neutral).pow(2).mean()

    def left_at(self, reach: float) -> float:
        """The share of `distance` that `erase` has left when predictions went `reach` of the way to `neutral`."""
        return max(0.0, 1 - reach / (1 + self.push)) ** 2

    def reached(self, left: float) -> float:
        """The share of the way to `neutral` that predictions went when `erase` is `left` of `distance`.

        It is the inverse of `left_at`: negative if they moved away from it, above 1 if they went beyond it.
        """
        return (1 - math.sqrt(max(0.0, left))) * (1 + self.push)


class SelfDistillation(Objective):
    """The concept's prediction becomes the surrogate's, `neutral`, without pushing beyond it."""

    teacher: Literal["base", "student"]

    @property
    def push(self) -> float:
        return 0.0

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """The surrogate's prediction."""
        return neutral

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
        """Return the losses; with the teacher "student", the model being erased predicts the surrogate now."""
        import torch

        if self.teacher == "student":
            with torch.no_grad():
                neutral = base.predict(batch.latents, batch.times, batch.neutral_states)
            batch = replace(batch, neutral=neutral)
        return super().losses(base, batch)
