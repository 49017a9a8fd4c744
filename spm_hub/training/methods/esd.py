"""ESD's loss: the concept's prediction is sent to where guidance away from the concept would draw.

Gandikota et al., Erasing Concepts from Diffusion Models, ICCV 2023, arXiv 2303.07345.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from spm_hub.training.methods.method import TARGET_KEYS, Method
from spm_hub.training.objective import Objective
from spm_hub.training.recipe.fields import RecipeFields

if TYPE_CHECKING:
    from torch import Tensor


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
        """Return the prediction that the loss pulls to, in either convention."""
        start = neutral if self.convention == "paper" else concept
        return start - self.eta * (concept - neutral)


def make_objective(recipe: RecipeFields) -> ESD:
    """Return the objective of a recipe."""
    return ESD(recipe.objective.eta, recipe.objective.convention)


KEYS = TARGET_KEYS | {"objective.convention"}
# The paper's own settings are in manifests/recipes: no anchors, and a number of steps, which holds on the base that it
# was chosen for. Here four anchors are drawn for each x_t, of which a batch takes one at random, their weight is
# steered so that the concept goes, and a training ends where it has gone.
PRESET: dict[str, Any] = {
    "objective": {"name": "esd", "eta": 2.0, "convention": "rewrite"},
    "x_t": {"guidance": (3.0,)},
    "anchoring": {"weight": 20.0, "reach": 0.9, "per_target": 1, "drawn": 4},
    "optimiser": {"lr": 5e-4, "schedule": "constant", "warmup": 10, "ema": 0.9},
    "stop": {"reach": 0.9},
}
_MODULES = {
    "esd-x": "cross-attention: the paper's choice for styles and artists",
    "esd-x-strict": "keys and values of cross-attention: ESD in a file of half the size",
    "esd-x-strict-text": "keys and values of attention, on FLUX and SD3 also those of the text",
    "esd-u": "everything but cross-attention: the paper's choice for nudity and for objects",
    "esd-all": "all of the denoiser: for a comparison with the other choices of modules",
    "esd-selfattn": "self-attention: for a comparison with the other choices of modules",
}

METHODS = tuple(
    Method(
        name=name,
        title=f"ESD, module choice {name.removeprefix('esd-')}",
        paper="Gandikota et al., ICCV 2023, arXiv 2303.07345",
        summary=f"Trains whole weights of {modules}.",
        cost="Half a minute to a minute on the sketchbook; a file of the size of the trained modules.",
        harm="Fully on it takes other subjects along, on some bases many; attacks brought a style back.",
        preset={**PRESET, "increment": {"kind": "dense", "modules": name}},
        objective=make_objective,
        uses=KEYS,
    )
    for name, modules in _MODULES.items()
)
