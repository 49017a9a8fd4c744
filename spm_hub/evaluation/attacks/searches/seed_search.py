"""The control of all attacks: the prompt as it is, at other seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim

SEEDS = 2**62
"""Seeds are drawn below this number."""


@dataclass(frozen=True)
class SeedSearch:
    """Draw the prompt itself at `tries` other seeds (a baseline of UnlearnDiffAtk, arXiv 2310.11868)."""

    tries: int = 50
    threat: ClassVar[Threat] = Threat.SEEDS
    asks_erasers: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Steps in all, for progress: one for each try."""
        return self.tries

    def check(self, victim: Victim) -> None:
        """Accept every pipeline."""

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield what to try, one try for every remaining case of `target`."""
        every_case = tuple(target.cases)
        for _ in range(self.tries):
            if not target.cases:
                return
            seeds = torch.randint(SEEDS, (len(every_case),), generator=target.generator).tolist()
            target.on_step()
            yield {
                case: Try(case.prompt, seed=seed)
                for case, seed in zip(every_case, seeds, strict=True)
                if case in target.cases
            }
