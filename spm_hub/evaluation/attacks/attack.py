"""The interface of an attack, and the pipeline and cases that it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import AttackDrawingOptions, Try
from spm_hub.evaluation.attacks.victim import Victim

_SEEDS = 2**62


@dataclass(frozen=True)
class AttackTarget:
    """The pipeline to attack, and the cases for which the concept has not come back yet.

    cases: the caller removes successful cases between two rounds.
    pictures: (n, *latent_shape), the base's latents of the concept for each of the initial cases.
    generator: for everything random. on_step: to call after every step.
    names: of the concept: its target and aliases.  drawing: how the judged pictures are drawn.
    """

    victim: Victim
    cases: list[Case]
    pictures: Tensor
    generator: torch.Generator
    on_step: Callable[[], None]
    names: tuple[str, ...] = ()
    drawing: AttackDrawingOptions = field(default_factory=AttackDrawingOptions)

    def generators(self) -> dict[Case, torch.Generator]:
        """Return a generator for each case, independent of the other cases and of the gate."""
        start = int(torch.randint(_SEEDS, (), generator=self.generator))
        return {case: torch.Generator().manual_seed((start + case.seed) % _SEEDS) for case in self.cases}


class Attack(Protocol):
    """Interface of an attack: it yields rounds of tries, each to be drawn and judged.

    An attack with `asks_erasers = False` searches without the erasers: under several gates it does so once.
    """

    @property
    def threat(self) -> Threat:
        """The threat model: the most that the attacker must be able to do."""

    @property
    def steps(self) -> int:
        """Steps in all, for progress."""

    @property
    def tries(self) -> int:
        """The most pictures that are drawn and judged for a case."""

    def check(self, victim: Victim) -> None:
        """Raise ModelError for a pipeline that this attack cannot work on; called before anything is drawn."""

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield what to try, one try for every remaining case of `target`."""
