"""R.A.C.E.: any method whose training an adversary attacks in the text states.

Kim et al., R.A.C.E.: Robust Adversarial Concept Erasure for Secure Text-to-Image Diffusion Model, ECCV 2024,
arXiv 2405.16341. The adversary is `data.adversary`, which any recipe of the prediction loop may switch on.
"""

from __future__ import annotations

from typing import Any

from spm_hub.training.methods import esd, spm
from spm_hub.training.methods.method import Method

_ADVERSARY: dict[str, Any] = {"steps": 10, "unit": "rms"}
_PAPER = "Kim et al., ECCV 2024, arXiv 2405.16341"

METHODS = (
    Method(
        name="race",
        title="R.A.C.E. on ESD-x",
        paper=_PAPER,
        summary="Trains ESD against an adversary: for a concept that attackers will try to bring back.",
        cost="Ten more passes of the denoiser, with gradients, in each attacked step.",
        harm="Pictures of everything else change more than with ESD.",
        preset={**esd.PRESET, "increment": {"kind": "dense", "modules": "esd-x"}, "adversary": _ADVERSARY},
        objective=esd.make_objective,
        uses=esd.KEYS,
    ),
    # The goal is the base's prediction of the concept: the noise that a trajectory began with is only close to that.
    Method(
        name="race-spm",
        title="R.A.C.E. on SPM",
        paper=_PAPER,
        summary="Trains SPM's small adapter against an adversary: robust, in a file of kilobytes to a few megabytes.",
        cost="Ten more passes of the denoiser, with gradients, in each attacked step.",
        harm="Neighbours of the concept change more than with SPM.",
        preset={"objective": {"name": "spm"}, "adversary": {**_ADVERSARY, "epsilon": 0.3, "goal": "concept"}},
        objective=spm.make_objective,
    ),
)
