"""SDD: the concept's prediction becomes the model's own unconditional one; the weights' moving average is kept.

Kim et al., Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models, 2023, arXiv 2307.05977.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spm_hub.training.objective import SelfDistillation


@dataclass(frozen=True)
class SDD(SelfDistillation):
    """|| eps(x_t, c) - sg(eps(x_t, c0)) ||^2, sg: without gradients.

    teacher: who predicts eps(x_t, c0): the model being erased ("student", the paper's), or the frozen base. The moving
    average that draws x_t and is saved is `optimiser.ema`.
    """

    teacher: Literal["base", "student"] = "student"
