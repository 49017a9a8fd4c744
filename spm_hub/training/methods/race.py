"""R.A.C.E.: any method whose training an adversary attacks in the text states.

Kim et al., R.A.C.E.: Robust Adversarial Concept Erasure for Secure Text-to-Image Diffusion Model, ECCV 2024,
arXiv 2405.16341. The adversary is `data.adversary`, which any recipe of the prediction loop may switch on.
"""

from __future__ import annotations

from typing import Any

from spm_hub.training.methods import esd, spm
from spm_hub.training.methods.method import Method

_ADVERSARY: dict[str, Any] = {"steps": 10, "unit": "rms"}
_UNANCHORED: dict[str, Any] = {
    **esd.PRESET,
    "anchoring": {"weight": 0.0, "reach": None, "per_target": 0},
    "optimiser": {"lr": 1e-3},
    "stop": {},
}
"""ESD as its paper has it: the adversary begins at half of the steps, before which a stop at a reach would end it."""
_PAPER = "Kim et al., ECCV 2024, arXiv 2405.16341"

METHODS = (
    Method(
        name="race",
        title="R.A.C.E. on ESD-x",
        paper=_PAPER,
        summary="Trains ESD-x against an adversary in the text states: the paper's method, for comparisons.",
        cost="Five times the time of esd-x.",
        harm="Nothing is anchored, so that others change; up to 8 % of the concept's pictures stay; attacks succeed.",
        preset={**_UNANCHORED, "increment": {"kind": "dense", "modules": "esd-x"}, "adversary": _ADVERSARY},
        objective=esd.make_objective,
        uses=esd.KEYS,
    ),
    # The goal is the base's prediction of the concept: the noise that a trajectory began with is only close to that.
    Method(
        name="race-spm",
        title="R.A.C.E. on SPM",
        paper=_PAPER,
        summary="Trains SPM against an adversary: for a concept that attackers will try to bring back.",
        cost="Fifteen times the time of spm; the same small file.",
        harm="Other concepts change a little more than with spm; attacks succeeded in 1 of 30 cases.",
        preset={"objective": {"name": "spm"}, "adversary": {**_ADVERSARY, "epsilon": 0.3, "goal": "concept"}},
        objective=spm.make_objective,
        uses=spm.KEYS,
    ),
)
