"""The control of all searches for text: random tokens before the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim


@dataclass(frozen=True)
class RandomTokens:
    """Put random tokens before the prompt, others for every try.

    A baseline of UnlearnDiffAtk (arXiv 2310.11868, Table 2). An attack that does not exceed it at the same number of
    judged pictures found no more than the judge's errors and the luck of the draw.
    """

    tokens: int = 3
    tries: int = 50
    token_free: bool = False
    threat: ClassVar[Threat] = Threat.TEXT
    asks_erasers: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Steps in all, for progress: one for each try."""
        return self.tries

    def check(self, victim: Victim) -> None:
        """Accept every pipeline: words of the first vocabulary are text for all encoders."""

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield prompts to try, one for every remaining case of `target`."""
        every_case = tuple(target.cases)
        vocabulary = target.victim.vocabularies[0]
        vocabulary.check_room(self.tokens, [case.prompt for case in every_case])
        ids = vocabulary.searchable(target.names if self.token_free else (), printable=True)
        for _ in range(self.tries):
            if not target.cases:
                return
            # Drawn for all cases, so that a case's tokens do not depend on which others remain.
            drawn = torch.randint(len(ids), (len(every_case), self.tokens), generator=target.generator)
            texts = vocabulary.write(ids[drawn], [case.prompt for case in every_case])
            target.on_step()
            yield {case: Try(text) for case, text in zip(every_case, texts, strict=True) if case in target.cases}
