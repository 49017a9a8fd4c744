"""What all objectives share that send a concept's prediction away from the base's own."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Objective(ABC):
    """Predictions of the frozen base: `concept`, of the prompt that is trained on, and `neutral`, of the same without
    the concept. All tensors (n, *latent_shape).
    """

    @property
    @abstractmethod
    def push(self) -> float:
        """How far beyond `neutral` the target lies, in distances between `concept` and `neutral`."""

    @abstractmethod
    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """What the prediction is pulled to."""

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
        """What `erase` is before anything was trained: the whole way from the concept's prediction to the target."""
        return (1 + self.push) ** 2 * (concept - neutral).pow(2).mean()

    def left_at(self, reach: float) -> float:
        """The share of `distance` that `erase` has left when predictions went `reach` of the way to `neutral`."""
        return max(0.0, 1 - reach / (1 + self.push)) ** 2
