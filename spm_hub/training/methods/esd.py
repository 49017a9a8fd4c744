"""ESD's loss: the concept's prediction is sent to where guidance away from the concept would draw.

Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from spm_hub.training.objective import Objective


@dataclass(frozen=True)
class ESD(Objective):
    """Eq. 6 as a loss: || eps(x_t, c) - ( eps*(x_t, c0) - eta (eps*(x_t, c) - eps*(x_t, c0)) ) ||^2.

    convention: "paper" is that; the authors' "rewrite" of 2025 begins at eps*(x_t, c) instead of eps*(x_t, c0), so that
    its eta is the paper's plus 1.
    """

    eta: float
    convention: Literal["paper", "rewrite"] = "paper"

    @property
    def push(self) -> float:
        return self.eta if self.convention == "paper" else self.eta - 1

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """What the loss pulls to, in either convention."""
        start = neutral if self.convention == "paper" else concept
        return start - self.eta * (concept - neutral)
