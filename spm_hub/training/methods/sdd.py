"""SDD: turns the concept's prediction into the unconditional one; saves the moving average.

Kim et al., Towards Safe Self-Distillation of Internet-Scale Text-to-Image Diffusion Models, 2023, arXiv 2307.05977.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spm_hub.training.methods.method import PREDICTION_KEYS, Method
from spm_hub.training.objective import SelfDistillation


@dataclass(frozen=True)
class SDD(SelfDistillation):
    """|| eps(x_t, c) - sg(eps(x_t, c0)) ||^2, sg: without gradients.

    teacher: who predicts eps(x_t, c0): the model being erased ("student", the paper's), or the frozen base. The moving
    average that draws x_t and is saved is `optimiser.ema`.
    """

    teacher: Literal["base", "student"] = "student"


METHOD = Method(
    name="sdd",
    title="SDD, safe self-distillation",
    paper="Kim et al., 2023, arXiv 2307.05977",
    summary="Makes the concept's prediction the unconditional one, and saves a moving average: for styles and nudity.",
    cost="Less than a minute on the sketchbook; a file of the size of cross-attention.",
    harm="Nothing is anchored: without a gate most other subjects were lost, and a style may stay.",
    preset={
        "objective": {"name": "sdd", "teacher": "student"},
        "increment": {"kind": "dense", "modules": "esd-x"},
        "x_t": {"guidance": (3.0,)},
        "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
        "optimiser": {"lr": 1e-3, "ema": 0.95},
    },
    objective=lambda recipe: SDD(recipe.objective.teacher),
    uses=PREDICTION_KEYS | {"objective.teacher", "objective.paired"},
    instead={"objective.eta": "the unconditional prediction is its target; methods 'spm' and 'esd-x' go beyond it"},
)
