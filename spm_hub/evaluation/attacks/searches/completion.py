"""Diffusion completion: the base draws the first steps of a picture, the erased model the rest.

Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.samplers import ProbingSampler
from spm_hub.evaluation.attacks.tries import Try, draw
from spm_hub.evaluation.attacks.victim import Victim


@dataclass(frozen=True)
class Completion:
    """Give the erased model the base's x_t after k steps.

    k is `every` steps at the first try, and as many more at each of the `tries`. Defaults are the first three of the
    paper's. Steps are those of DDIM, whatever the pipeline's own sampler is.
    """

    every: int = 5
    tries: int = 3
    threat: ClassVar[Threat] = Threat.LATENTS

    @property
    def steps(self) -> int:
        """Steps in all, for progress: one for each try."""
        return self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError for a flow."""
        ProbingSampler.of(victim.pipe.scheduler)

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield what to try, one try for every remaining case of `target`."""
        for number in range(1, self.tries + 1):
            left, done = tuple(target.cases), number * self.every
            if not left:
                return
            asked = [(case, Try(case.prompt, options={"until": done})) for case in left]
            with target.victim.erasers_off(), torch.no_grad():
                _, latents = draw(target.victim.pipe, asked, target.drawing)
            target.on_step()
            yield {case: Try(case.prompt, latents=row, start=done) for case, row in zip(left, latents, strict=True)}
