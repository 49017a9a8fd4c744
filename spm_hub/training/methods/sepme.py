"""SepME's loss: what the concept does to the prediction is made uncorrelated with what it did (G-CiRs).

Zhao et al., Separable Multi-Concept Erasure from Diffusion Models, arXiv 2402.05947, section on concept-irrelevant
representations. Equations are numbered as in the authors' later text of it: Forget All That Should Be Forgotten:
Separable, Recoverable, and Sustainable Multi-Concept Erasure from Diffusion Models (SRS-ME).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from spm_hub.training.objective import Losses, Objective

if TYPE_CHECKING:
    from spm_hub.training.base_model import BaseModel
    from spm_hub.training.data.batch import Batch


@dataclass(frozen=True)
class SepME(Objective):
    """L_cor(c) = mean( r_c(theta + dtheta) * r_c(theta) ), r_c(theta) = eps(x_t, c; theta) - eps(x_t, c0; theta).

    Eq. 28, and 27 for r_c. The product is element-wise, without a root, a cosine or guidance. It is 0 where the
    concept's own direction is gone, and falls below without a bound: whoever minimises it stops.
    """

    # At the paper's beta gradients lie below Adam's epsilon: as shares of anything, they would make other steps.
    relative: ClassVar[bool] = False

    @property
    def push(self) -> float:
        return 0.0

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """eps*(x_t, c0), the nearest prediction at which nothing of r_c is left."""
        return neutral

    def losses(self, base: BaseModel, batch: Batch) -> Losses:
        prediction, anchors = self.predicted(base, batch)
        without = base.predict(batch.latents, batch.times, batch.neutral_states)
        before = batch.concept - batch.neutral
        return Losses(
            correlation(prediction - without, before),
            self.anchor(anchors, batch.anchor_predictions) if len(anchors) else anchors.new_zeros(()),
            self.distance(batch.concept, batch.neutral),
        )

    def erase(self, prediction: Tensor, concept: Tensor, neutral: Tensor) -> Tensor:
        """L_cor where the prediction without the concept is still the base's."""
        return correlation(prediction - neutral, concept - neutral)

    def left_at(self, reach: float) -> float:
        """L_cor falls in proportion to the way that is gone, not to its square."""
        return 1 - reach


def correlation(now: Tensor, before: Tensor) -> Tensor:
    """The mean over all elements of r_c(theta + dtheta) * r_c(theta); tensors (n, *latent_shape)."""
    return (now * before).mean()


def balance(losses: Sequence[Tensor]) -> Tensor:
    """Eq. 35: eta_i = max_k |L_cor(c_k)| / |L_cor(c_i)| of several concepts, (concepts,), without gradient."""
    sizes = torch.stack([loss.detach().abs() for loss in losses])
    return sizes.max() / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
