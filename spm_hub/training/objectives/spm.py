"""SPM's erase and anchoring losses.

Lyu et al., One-dimensional Adapter to Rule Them All, CVPR 2024, arXiv 2312.16145.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SPM:
    """eta: how far beyond the surrogate's prediction the erased prediction is sent; weight: the anchoring's lambda."""

    eta: float
    weight: float

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """eps*(x_t, c0) - eta (eps*(x_t, c_tar) - eps*(x_t, c0)): what Eq. 4 pulls to. All tensors (n, c, h, w)."""
        return neutral - self.eta * (concept - neutral)

    def erase(self, prediction: Tensor, concept: Tensor, neutral: Tensor) -> Tensor:
        """Eq. 4, the mean over all elements of (eps(x_t, c_tar) - target)^2."""
        return (prediction - self.target(concept, neutral)).pow(2).mean()

    def anchor(self, prediction: Tensor, kept: Tensor) -> Tensor:
        """Eq. 7 without its lambda: the mean of (eps(x_t, c~) - eps*(x_t, c~))^2 over the anchors."""
        return (prediction - kept).pow(2).mean()

    def loss(self, erase: Tensor, anchor: Tensor) -> Tensor:
        """Eq. 8: L_era + lambda L_anc."""
        return erase + self.weight * anchor
