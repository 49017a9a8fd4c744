"""Concept Ablation: the concept's prediction becomes that of an anchor concept, which the surrogate names.

Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516: the
model-based variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spm_hub.training.objective import SelfDistillation


@dataclass(frozen=True)
class ConceptAblation(SelfDistillation):
    """|| eps(x_t, c) - sg(eps(x_t, c_anchor)) ||^2 + lambda (prior loss), sg: without gradients.

    teacher: who predicts eps(x_t, c_anchor): the model being erased ("student", the paper's), or the frozen base.
    The prior loss is the anchoring loss on the anchor concept's own sentences (anchoring.source "surrogate"): they are
    held to the base's prediction, which is what the noise of the base's own pictures is on average, where the paper
    takes single draws of that noise.
    """

    teacher: Literal["base", "student"] = "student"
