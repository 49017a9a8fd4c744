"""SPM's erase and anchoring losses.

Lyu et al., One-dimensional Adapter to Rule Them All, CVPR 2024, arXiv 2312.16145.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SPM:
    """eta: how far beyond the surrogate's prediction the erased prediction is sent."""

    eta: float

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """eps*(x_t, c0) - eta (eps*(x_t, c_tar) - eps*(x_t, c0)): what Eq. 4 pulls to. All tensors (n, c, h, w)."""
        return neutral - self.eta * (concept - neutral)

    def erase(self, prediction: Tensor, concept: Tensor, neutral: Tensor) -> Tensor:
        """Eq. 4, the mean over all elements of (eps(x_t, c_tar) - target)^2."""
        return (prediction - self.target(concept, neutral)).pow(2).mean()

    def anchor(self, prediction: Tensor, kept: Tensor) -> Tensor:
        """Eq. 7 without its lambda: the mean of (eps(x_t, c~) - eps*(x_t, c~))^2 over the anchors."""
        return (prediction - kept).pow(2).mean()

    def loss(self, erase: Tensor, anchor: Tensor, weight: float) -> Tensor:
        """Eq. 8: L_era + lambda L_anc."""
        return erase + weight * anchor

    def distance(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """What Eq. 4 is before anything was trained: the whole way from the concept's prediction to the target."""
        return (1 + self.eta) ** 2 * (concept - neutral).pow(2).mean()

    def left_at(self, reach: float) -> float:
        """The share of `distance` that Eq. 4 has left when predictions went `reach` of the way to the surrogate's."""
        return max(0.0, 1 - reach / (1 + self.eta)) ** 2
