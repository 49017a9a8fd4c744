"""Diffusion completion: the base draws the first steps of a picture, the erased model the rest.

Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013, section 4.
"""

from __future__ import annotations

import inspect
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

    k is the share `share` of all steps at the first try, and as much more at each of the `tries`, as long as a step is
    left to the erased model. Defaults are those of the authors: 5, 10 and 15 of 50. Steps are those of DDIM, whatever
    the pipeline's own sampler is.
    """

    share: float = 0.1
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
        call = inspect.signature(type(target.victim.pipe).__call__).parameters
        steps = target.drawing.steps or call["num_inference_steps"].default
        for number in range(1, self.tries + 1):
            left, done = tuple(target.cases), max(number, round(number * self.share * steps))
            if not left or done >= steps:
                return
            asked = [(case, Try(case.prompt, options={"until": done})) for case in left]
            with target.victim.erasers_off(), torch.no_grad():
                _, latents = draw(target.victim.pipe, asked, target.drawing)
            target.on_step()
            yield {case: Try(case.prompt, latents=row, start=done) for case, row in zip(left, latents, strict=True)}
