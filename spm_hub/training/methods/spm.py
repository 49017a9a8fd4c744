"""SPM's erase loss; its anchoring loss, which any objective may add, is in `base`.

Lyu et al., One-dimensional Adapter to Rule Them All, CVPR 2024, arXiv 2312.16145.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spm_hub.training.methods.method import TARGET_KEYS, Method
from spm_hub.training.objective import Losses, Objective
from spm_hub.training.recipe.fields import RecipeFields

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.batch import Batch


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

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
        """Return the losses; with `objective.positive` its prediction takes the concept's place in the target."""
        if batch.positive is None:
            return super().losses(base, batch)
        prediction, anchors = self.predicted(base, batch)
        goal = self.target(batch.positive, batch.neutral)
        return Losses(
            (prediction - goal).pow(2).mean(),
            self.anchor(anchors, batch.anchor_predictions) if len(anchors) else anchors.new_zeros(()),
            (batch.concept - goal).pow(2).mean(),
        )


def make_objective(recipe: RecipeFields) -> SPM:
    """Return the objective of a recipe."""
    return SPM(recipe.objective.eta)


KEYS = TARGET_KEYS | {"objective.positive"}
# Small batches and many anchors, of which each batch takes a few: a training ends where the concept has gone. The
# paper's own settings are in manifests/recipes.
PRESET: dict[str, Any] = {
    "batch_size": 4,
    "steps": 240,
    "x_t": {"trajectories": 12, "steps": 12, "chunks": 3},
    "anchoring": {"weight": 15.0, "per_target": 1, "drawn": 4},
    "optimiser": {"lr": 8e-3, "schedule": "constant", "warmup": 10, "ema": 0.95},
    "stop": {"reach": 0.85, "every": 10},
}
METHOD = Method(
    name="spm",
    title="SPM, one-dimensional adapters",
    paper="Lyu et al., CVPR 2024, arXiv 2312.16145",
    summary="Trains a rank-1 adapter and anchors everything else: the default, for any single concept.",
    cost="A quarter of a minute on the sketchbook; a small file: two vectors for each module.",
    harm="Little on the sketchbook, more on another base; attacks brought a style back in 4 of 10 cases.",
    preset=PRESET,
    objective=make_objective,
    uses=KEYS,
)
