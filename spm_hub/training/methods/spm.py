"""SPM's erase loss; its anchoring loss, which any objective may add, is in `base`.

Lyu et al., One-dimensional Adapter to Rule Them All, CVPR 2024, arXiv 2312.16145.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from spm_hub.training.objective import Objective


@dataclass(frozen=True)
class SPM(Objective):
    """eta: how far beyond the surrogate's prediction the erased prediction is sent."""

    eta: float

    @property
    def push(self) -> float:
        return self.eta

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """eps*(x_t, c0) - eta (eps*(x_t, c_tar) - eps*(x_t, c0)): what Eq. 4 pulls to."""
        return neutral - self.eta * (concept - neutral)
