"""P4D: searches for a prompt that makes the erased model predict as the base does for the concept.

Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, ICML 2024,
arXiv 2309.06135.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
        victim, cases, vocabulary = target.victim, target.cases, target.victim.vocabulary
        ids = vocabulary.searchable(target.names if self.token_free else ())
        if self.every is None:
            vocabulary.check_room(self.tokens, [""])
        table = vocabulary.table[ids]
        by_angle = F.normalize(table, dim=1)
        blank = Frame((), tuple(range(self.tokens)))
        frames = {
            case: blank if self.every is None else Frame.of(vocabulary, case.prompt, self.every) for case in cases
        }
        most = max(len(frame.places) for frame in frames.values())
        begin = target.generators()
        # The noise has generators of its own, so that all kinds of P4D imitate the same predictions.
        noise, pictures = target.generators(), dict(zip(cases, target.pictures, strict=True))
        points = {
            case: nn.Parameter(table[torch.randint(len(ids), (len(frame.places),), generator=begin[case])].clone())
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
            places = torch.tensor([_padded(frames[case].places, most) for case in left])
            for noised in self._teacher_batches(victim, {case: pictures[case] for case in left}, noise):
                texts = [current_prompt(case) for case in left]
                moves = victim.token_gradients(noised, texts, most, places, self.adaptive)
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
        self, victim: Victim, pictures: Mapping[Case, Tensor], noise: Mapping[Case, torch.Generator]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return x_t, times and the base's predictions for every iteration up to the next try.

        They are computed in one go, because erasers have to be off meanwhile.
        pictures: of the remaining cases.  noise: the generator of each case, for its times and noise.
        """
        prompts, found = [case.prompt for case in pictures], []
        conditioning, x_0 = victim.encode(prompts), torch.stack(list(pictures.values()))
        for _ in range(self.iterations):
            times = torch.cat([victim.noising.random_times(1, noise[case]) for case in pictures])
            times = times.to(victim.base.device)
            drawn = torch.cat([victim.base.noise(1, noise[case]) for case in pictures])
            x_t, _ = victim.noising.add_noise(x_0, drawn, times)
            found.append((x_t, times, victim.base_predictions(x_t, times, prompts, conditioning)))
        return found


def _padded(places: Sequence[int], most: int) -> list[int]:
    return [*places, *[NOWHERE] * (most - len(places))]
