"""Concept Ablation: turns the concept's prediction into that of an anchor concept, the surrogate.

Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516: the model-based
variant and, with objective.goal "noise", the noise-based one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spm_hub.training.methods.method import PREDICTION_KEYS, Method
from spm_hub.training.objective import Losses, SelfDistillation
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.validation import ImpossibleRecipeError, check_prediction

if TYPE_CHECKING:
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.batch import Batch


@dataclass(frozen=True)
class ConceptAblation(SelfDistillation):
    """|| eps(x_t, c) - sg(eps(x_t, c_anchor)) ||^2 + lambda (prior loss), sg: without gradients.

    teacher: who predicts eps(x_t, c_anchor): the model being erased ("student", the paper's), or the frozen base.
    The prior loss is the anchoring loss on the anchor concept's own sentences (anchoring.source "surrogate"): they are
    kept at the base's prediction, which is the average noise of the base's own pictures; the paper takes single draws
    of that noise.
    """

    teacher: Literal["base", "student"] = "student"


@dataclass(frozen=True)
class NoiseAblation(ConceptAblation):
    """|| eps(x_t, c) - n ||^2 + lambda || eps(x_t, c_anchor) - n ||^2: the noise-based variant.

    x_t is the anchor concept's picture with noise n: training goes on as the model was trained, on pairs of the
    concept's sentence and the anchor concept's picture. In place of n stands what the model is trained to predict of it
    (velocity, flow).
    """

    def losses(self, base: TeacherModel, batch: Batch) -> Losses:
        """Return the losses; `left` is the distance to the base's prediction of the anchor concept."""
        if batch.truth is None:
            raise ValueError("the noise-based variant needs latents that noise was added to: x_t.source 'q_sample'")
        prediction, anchors = self.predicted(base, batch)
        noise = batch.truth.repeat_interleave(len(anchors) // len(prediction), dim=0)
        return Losses(
            (prediction - batch.truth).pow(2).mean(),
            self.anchor(anchors, noise) if len(anchors) else anchors.new_zeros(()),
            self.distance(batch.concept, batch.neutral),
            left=(prediction.detach() - batch.neutral).pow(2).mean(),
        )


def make_objective(recipe: RecipeFields) -> ConceptAblation:
    """Return the objective of a recipe."""
    return NoiseAblation() if recipe.objective.goal == "noise" else ConceptAblation(recipe.objective.teacher)


def check(recipe: RecipeFields) -> None:
    """Refuse a recipe without an anchor concept."""
    check_prediction(recipe)
    if not recipe.surrogate:
        raise ImpossibleRecipeError(
            f"method 'ca' makes {recipe.target!r} into an anchor concept, a broader or similar one, and none is named, "
            "nor known for it; --method sdd needs none",
            mend="--set surrogate=dog, or whatever is to be drawn in its place",
        )
    if recipe.objective.goal != "noise":
        return
    x_t = recipe.x_t
    if x_t.source != "q_sample" or x_t.driver != "surrogate":
        raise ImpossibleRecipeError(
            f"objective.goal 'noise' is the noise in pictures of {recipe.surrogate!r}, and x_t.source {x_t.source!r} "
            f"with x_t.driver {x_t.driver!r} has none",
            mend="--set x_t.source=q_sample --set x_t.driver=surrogate",
        )
    if recipe.objective.teacher == "base":
        raise ImpossibleRecipeError(
            "objective.teacher 'base' would change nothing: objective.goal 'noise' needs no teacher",
            mend="leave objective.teacher out",
        )
    if recipe.anchoring.weight > 0 and recipe.anchoring.source != "surrogate":
        raise ImpossibleRecipeError(
            f"objective.goal 'noise' holds the anchor concept's own sentences at that noise, and anchoring.source is "
            f"{recipe.anchoring.source!r}: it has to be 'surrogate'",
            mend="--set anchoring.source=surrogate",
        )


# The surrogate is the anchor concept, and the prior loss is the anchoring on its sentences.
METHOD = Method(
    name="ca",
    title="Concept Ablation",
    paper="Kumari et al., ICCV 2023, arXiv 2303.13516",
    summary="Turns the concept into a given anchor concept: for a concept with a natural substitute.",
    cost="A minute on the sketchbook; a file of the size of cross-attention's keys and values.",
    harm="Without a gate, a related concept may be lost to the anchor concept, which has to be named.",
    preset={
        "objective": {"name": "ca", "teacher": "student", "paired": True},
        "increment": {"kind": "dense", "modules": "esd-x-strict"},
        "x_t": {"guidance": (3.0,)},
        "anchoring": {"source": "surrogate", "weight": 1.0, "reach": None, "per_target": 1},
        "optimiser": {"lr": 1e-3},
    },
    objective=make_objective,
    uses=PREDICTION_KEYS | {"objective.teacher", "objective.paired", "objective.goal"},
    instead={"objective.eta": "the surrogate's prediction is its target; methods 'spm' and 'esd-x' go beyond it"},
    check=check,
)
