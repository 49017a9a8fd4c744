"""P4D: searches for a prompt that makes the erased model predict as the base does for the concept.

Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, ICML 2024,
arXiv 2309.06135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim
from spm_hub.evaluation.attacks.vocabulary import NOWHERE, Vocabulary, nearest_by_angle

LEAST_SCORE = 1e-6
"""Scores of a gate below this count as this: their logarithm is finite, and nothing is gained below."""


@dataclass(frozen=True)
class Frame:
    """A prompt in `parts`, with room for one token before each, at the token positions `places`."""

    parts: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, vocabulary: Vocabulary, prompt: str, every: int) -> Frame:
        """Split a prompt so that a token fits in front and after every `every` words.

        The authors' code counts tokens; but between two tokens of one word no other token can be typed.
        """
        words = prompt.split()
        parts = [" ".join(words[start : start + every]) for start in range(0, len(words) + 1, every)]
        lengths = [vocabulary.count(part) for part in parts]
        return cls(tuple(parts), tuple(sum(lengths[:i]) + i for i in range(len(parts))))

    def fill(self, words: Sequence[str]) -> str:
        """Return the prompt with these words at its places."""
        return " ".join(part for pair in zip_longest(words, self.parts) for part in pair if part)


@dataclass(frozen=True)
class P4D:
    """P4D-N: argmin over the N tokens of a prompt p* of || eps*(x_t, p) - eps(x_t, p*) ||^2.

    With `every` it is P4D-K: p* is p with a token in front and after every so many words (3 in the paper).
    Each token is a point in the text encoder's embedding space, read as the token with the nearest angle. AdamW moves
    the points by the gradient there. The prompt is tried after every `iterations` steps, `tries` times in all. x_t is
    the base's picture of the concept, in every step at a new random time with new noise. Gates stay in effect: a prompt
    that does not name the concept may have a low gamma.
    token_free: search no token of the concept's names.
    adaptive: lambda, adds lambda sum over gates of log(score of p*) to the loss, so that the search also moves away
    from what the gate sees.
    """

    tokens: int = 16
    every: int | None = None
    iterations: int = 60
    tries: int = 50
    lr: float = 0.1
    weight_decay: float = 0.1
    token_free: bool = False
    adaptive: float = 0.0
    threat: ClassVar[Threat] = Threat.WEIGHTS

    def __post_init__(self) -> None:
        """Raise UsageError unless `adaptive` is a finite number of at least 0."""
        if not 0 <= self.adaptive < math.inf:
            raise UsageError(f"adaptive is {self.adaptive}; it is a finite number, at least 0", mend="--adaptive 0.1")

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""
        return self.iterations * self.tries

    def check(self, victim: Victim) -> None:
        """Raise ModelError unless the text encoders share one vocabulary."""
        _ = victim.vocabulary

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield prompts to try, one for every remaining case of `target`."""
        victim, cases, generator = target.victim, target.cases, target.generator
        base, vocabulary = victim.base, victim.vocabulary
        ids = vocabulary.searchable(target.names if self.token_free else ())
        if self.every is None:
            vocabulary.check_room(self.tokens, [""])
        table = vocabulary.table[ids]
        by_angle = F.normalize(table, dim=1)
        every_case = tuple(cases)
        blank = Frame((), tuple(range(self.tokens)))
        frames = {
            case: blank if self.every is None else Frame.of(vocabulary, case.prompt, self.every) for case in cases
        }
        points = {
            case: nn.Parameter(table[torch.randint(len(ids), (len(frame.places),), generator=generator)].clone())
            for case, frame in frames.items()
        }
        adam = {
            case: torch.optim.AdamW([point], lr=self.lr, weight_decay=self.weight_decay)
            for case, point in points.items()
        }

        def current_prompt(case: Case) -> str:
            nearest = nearest_by_angle(points[case], by_angle).cpu()
            return frames[case].fill(vocabulary.words(ids[nearest]))

        for _ in range(self.tries):
            left = tuple(cases)
            if not left:
                return
            rows = [every_case.index(case) for case in left]
            for x_t, times, goal in self._teacher_batches(victim, left, target.pictures, rows, generator):
                texts = [current_prompt(case) for case in left]
                most = max(len(frames[case].places) for case in left)
                places = [frames[case].places for case in left]
                padded = torch.tensor([[*own, *[NOWHERE] * (most - len(own))] for own in places])
                shift = torch.zeros((len(left), most, table.shape[1]), device=base.device, requires_grad=True)
                conditioning = victim.encode(texts, shift, padded)
                prediction = victim.predict(x_t, times, texts, conditioning)
                # Sum over cases, mean within a case: each case has the gradient that it would have alone.
                loss = (prediction - goal).pow(2).flatten(1).mean(dim=1).sum()
                if self.adaptive:
                    loss = loss + self.adaptive * victim.scores(conditioning.states).clamp_min(LEAST_SCORE).log().sum()
                (moves,) = torch.autograd.grad(loss, shift)
                if self.adaptive and not moves.isfinite().all():
                    raise UsageError(
                        "the score of the gate has no finite gradient: a search along it would find nothing",
                        mend="leave --adaptive out, or mend the gate's scores(states)",
                    )
                for case, move in zip(left, moves, strict=True):
                    points[case].grad = move[: len(points[case])].to(points[case])
                    adam[case].step()
                target.on_step()
            yield {case: Try(current_prompt(case)) for case in left}

    @torch.no_grad()
    def _teacher_batches(
        self, victim: Victim, left: Sequence[Case], pictures: Tensor, rows: Sequence[int], generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return x_t, times and the base's predictions for every iteration up to the next try.

        They are computed in one go, because erasers have to be off meanwhile.
        rows: indices of the remaining cases in `pictures`. Noise is drawn for all pictures, so that a case's noise does
        not depend on which other cases remain.
        """
        prompts, found = [case.prompt for case in left], []
        with victim.erasers_off():
            conditioning = victim.encode(prompts)
            for _ in range(self.iterations):
                times = victim.noising.random_times(len(pictures), generator).to(victim.base.device)
                x_t, _ = victim.noising.add_noise(pictures, victim.base.noise(len(pictures), generator), times)
                x_t, times = x_t[rows], times[rows]
                found.append((x_t, times, victim.predict(x_t, times, prompts, conditioning)))
        return found
