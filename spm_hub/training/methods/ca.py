"""Concept Ablation: turns the concept's prediction into that of an anchor concept, the surrogate.

Kumari et al., Ablating Concepts in Text-to-Image Diffusion Models, ICCV 2023, arXiv 2303.13516: the
model-based variant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spm_hub.training.methods.method import PREDICTION_KEYS, Method
from spm_hub.training.objective import SelfDistillation
from spm_hub.training.recipe.fields import RecipeFields
from spm_hub.training.recipe.validation import check_prediction


@dataclass(frozen=True)
class ConceptAblation(SelfDistillation):
    """|| eps(x_t, c) - sg(eps(x_t, c_anchor)) ||^2 + lambda (prior loss), sg: without gradients.

    teacher: who predicts eps(x_t, c_anchor): the model being erased ("student", the paper's), or the frozen base.
    The prior loss is the anchoring loss on the anchor concept's own sentences (anchoring.source "surrogate"): they are
    kept at the base's prediction, which is the average noise of the base's own pictures; the paper takes single draws
    of that noise.
    """

    teacher: Literal["base", "student"] = "student"


def check(recipe: RecipeFields) -> None:
    """Refuse a recipe without an anchor concept."""
    check_prediction(recipe)
    if not recipe.surrogate:
        broader = "painting" if recipe.kind == "style" else "person" if recipe.kind == "person" else "dog"
        raise ValueError(
            f"method 'ca' makes {recipe.target!r} into an anchor concept, a broader or similar one, and none is named; "
            f"try: --set surrogate={broader}, for instance, or --method sdd, which needs none"
        )


# The surrogate is the anchor concept, and the prior loss is the anchoring on its sentences.
METHOD = Method(
    name="ca",
    title="Concept Ablation",
    paper="Kumari et al., ICCV 2023, arXiv 2303.13516",
    summary="Turns the concept into a given anchor concept: for a concept with a natural substitute.",
    cost="A minute on the sketchbook; a file of the size of cross-attention's keys and values.",
    harm="Little; related concepts may move towards the anchor concept, and it has to be named.",
    preset={
        "objective": {"name": "ca", "teacher": "student", "paired": True},
        "increment": {"kind": "dense", "modules": "esd-x-strict"},
        "x_t": {"guidance": (3.0,)},
        "anchoring": {"source": "surrogate", "weight": 1.0, "reach": None, "per_target": 1},
        "optimiser": {"lr": 1e-3},
    },
    objective=lambda recipe: ConceptAblation(recipe.objective.teacher),
    uses=PREDICTION_KEYS | {"objective.teacher", "objective.paired"},
    instead={"objective.eta": "the surrogate's prediction is its target; methods 'spm' and 'esd-x' go beyond it"},
    check=check,
)
