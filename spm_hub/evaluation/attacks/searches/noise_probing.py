"""Noise-based probing: draws the prompt with more noise in every step.

Lu et al., When Are Concepts Erased From Diffusion Models?, arXiv 2505.17013, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.samplers import ProbingSampler
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim


@dataclass(frozen=True)
class NoiseProbing:
    """Draw with DDIM at each eta of `etas` and each factor of its noise in `variances` (`ProbingSampler`).

    Defaults are those of the authors' code: 24 settings.
    most: at most so many of them, evenly spread over all.
    """

    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    variances: tuple[float, ...] = (1.0, 1.02, 1.03, 1.04)
    most: int | None = None
    threat: ClassVar[Threat] = Threat.LATENTS
    asks_erasers: ClassVar[bool] = False

    @property
    def tries(self) -> int:
        """The most pictures that are drawn and judged for a case."""
        settings = len(self.etas) * len(self.variances)
        return settings if self.most is None else min(self.most, settings)

    @property
    def steps(self) -> int:
        """Steps in all, for progress: one for each try."""
        return self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError for a flow, which has no eta."""
        ProbingSampler.of(victim.pipe.scheduler)

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield what to try, one try for every remaining case of `target`."""
        settings = list(product(self.etas, self.variances))
        for number in range(self.tries):
            eta, variance = settings[number * len(settings) // self.tries]
            if not target.cases:
                return
            target.on_step()
            yield {case: Try(case.prompt, options={"eta": eta, "variance": variance}) for case in target.cases}
