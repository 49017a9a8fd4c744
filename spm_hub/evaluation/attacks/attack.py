"""The interface of an attack, and the pipeline and cases that it works on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.attacks.victim import Victim


@dataclass(frozen=True)
class AttackTarget:
    """The pipeline to attack, and the cases for which the concept has not come back yet.

    cases: the caller removes successful cases between two rounds.
    pictures: (n, *latent_shape), the base's latents of the concept for each of the initial cases.
    generator: for everything random. on_step: to call after every gradient step.
    """

    victim: Victim
    cases: list[Case]
    pictures: Tensor
    generator: torch.Generator
    on_step: Callable[[], None]


class Attack(Protocol):
    """Interface of an attack: it yields rounds of prompts to try."""

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, str]]:
        """Yield prompts to try, one for every remaining case of `target`."""
