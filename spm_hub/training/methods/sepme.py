"""SepME's loss (G-CiRs): makes the concept's effect on the prediction uncorrelated with its old one.

Zhao et al., Separable Multi-Concept Erasure from Diffusion Models, arXiv 2402.05947, section on concept-irrelevant
representations. Equations are numbered as in the authors' later text of it: Forget All That Should Be Forgotten:
Separable, Recoverable, and Sustainable Multi-Concept Erasure from Diffusion Models (SRS-ME).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spm_hub.training.methods.method import PREDICTION_KEYS, Method
from spm_hub.training.objective import Losses, Objective

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.batch import Batch


@dataclass(frozen=True)
class SepME(Objective):
    """L_cor(c) = mean( r_c(theta + dtheta) * r_c(theta) ), r_c the concept's effect on the prediction.

    r_c(theta) = eps(x_t, c; theta) - eps(x_t, c0; theta). Eq. 28, and 27 for r_c. The product is element-wise, without
    a root, a cosine or guidance. It is 0 if the concept's own direction is gone, and falls further without a bound: a
    training has to stop there.
    """

    # At the paper's beta gradients are below Adam's epsilon: divided by anything, they would make other steps.
    relative: ClassVar[bool] = False

    @property
    def push(self) -> float:
        return 0.0

    def target(self, concept: Tensor, neutral: Tensor) -> Tensor:
        """eps*(x_t, c0), the nearest prediction at which nothing of r_c is left."""
        return neutral

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
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

    def reached(self, left: float) -> float:
        """The share of r_c(theta) that is gone; above 1 once L_cor is below 0."""
        return 1 - left


def correlation(now: Tensor, before: Tensor) -> Tensor:
    """The mean over all elements of r_c(theta + dtheta) * r_c(theta); tensors (n, *latent_shape)."""
    return (now * before).mean()


METHOD = Method(
    name="sepme",
    title="SepME, separable multi-concept erasure",
    paper="Zhao et al., arXiv 2402.05947",
    summary="Trains erasers that leave each other's concepts and given prompts alone, exactly: for several concepts.",
    cost="Ten seconds a concept on the sketchbook; works on SD 1, SD 2 and SDXL only.",
    harm="None on protected prompts, to the letter; fully on, others change; a character stayed in 1 of 7 pictures.",
    preset={
        "objective": {"name": "sepme"},
        "increment": {"kind": "null_space", "modules": "esd-x-strict", "beta": 1e-2},
        "x_t": {"source": "q_sample", "guidance": (3.0, 7.5)},
        "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
        "regulariser": {"l1": 1e-6},
        "stop": {"below": 0.0},
        "optimiser": {"lr": 0.1, "schedule": "constant", "warmup": 0, "scale_lr": False},
    },
    objective=lambda recipe: SepME(),
    uses=PREDICTION_KEYS - {"erase_from"} | {"objective.paired"},
    instead={
        "objective.eta": "stop.below sets how far it goes",
        "erase_from": "its loss has no target prediction; method 'esd-x' has one",
    },
)
