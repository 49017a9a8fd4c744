"""PEZ: searches for a prompt whose text states are near the concept's, with the text encoder alone.

Wen et al., Hard Prompts Made Easy: Gradient-Based Discrete Optimization for Prompt Tuning and Discovery, NeurIPS 2023,
arXiv 2302.03668.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.attacks.vocabulary import nearest_by_angle


@dataclass(frozen=True)
class PEZ:
    """argmax over the tokens of a prompt p* of cos(e(p*), e(p)).

    e are the flattened text states, p is the case's prompt. Algorithm 1: every token is a point in the space of
    embeddings, read as the token at the least angle; AdamW moves the points by the gradient there. The best prompt of
    each `iterations` steps is tried, `tries` times in all. Neither the eraser nor the denoiser is asked. Defaults are
    those of the authors' code.
    token_free: search no token of the concept's names.
    """

    tokens: int = 16
    iterations: int = 3000
    tries: int = 1
    lr: float = 0.1
    weight_decay: float = 0.1
    token_free: bool = False
    threat: ClassVar[Threat] = Threat.TEXT
    asks_erasers: ClassVar[bool] = False

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""
        return self.iterations * self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError unless the text encoders share one vocabulary."""
        _ = victim.vocabulary

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield prompts to try, one for every remaining case of `target`."""
        victim, every_case = target.victim, tuple(target.cases)
        vocabulary = victim.vocabulary
        vocabulary.check_room(self.tokens, [""])
        ids = vocabulary.searchable(target.names if self.token_free else (), printable=True)
        table = vocabulary.table[ids]
        units = F.normalize(table, dim=1)
        drawn = torch.randint(len(ids), (len(every_case), self.tokens), generator=target.generator)
        points = {case: nn.Parameter(table[row].clone()) for case, row in zip(every_case, drawn, strict=True)}
        adam = {
            case: torch.optim.AdamW([point], lr=self.lr, weight_decay=self.weight_decay)
            for case, point in points.items()
        }
        with torch.no_grad():
            goals = dict(zip(every_case, victim.encode([case.prompt for case in every_case]).states, strict=True))
        for _ in range(self.tries):
            left = tuple(target.cases)
            if not left:
                return
            best = dict.fromkeys(left, (-torch.inf, ""))
            goal = torch.stack([goals[case] for case in left]).flatten(1)
            for _ in range(self.iterations):
                nearest = [ids[nearest_by_angle(points[case], units).cpu()] for case in left]
                texts = [" ".join(vocabulary.words(row)) for row in nearest]
                shift = torch.zeros((len(left), self.tokens, table.shape[1]), device=table.device, requires_grad=True)
                cosines = F.cosine_similarity(victim.encode(texts, shift).states.flatten(1), goal, dim=1)
                (moves,) = torch.autograd.grad((1 - cosines).sum(), shift)
                for case, text, cosine, move in zip(left, texts, cosines.tolist(), moves, strict=True):
                    best[case] = max(best[case], (cosine, text))
                    points[case].grad = move.to(points[case])
                    adam[case].step()
                target.on_step()
            yield {case: Try(text) for case, (_, text) in best.items()}
