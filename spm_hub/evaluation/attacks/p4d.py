"""P4D: a whole prompt under which the erased model predicts what the base predicts for the concept.

Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, ICML 2024,
arXiv 2309.06135.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.attacks.victim import Victim

_NOWHERE = 2**31
"""A place beyond every window."""


@dataclass(frozen=True)
class Frame:
    """A prompt with room for one token before each of its `parts`; those stand at `places` among its tokens."""

    parts: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, victim: Victim, prompt: str, every: int) -> Frame:
        """Room in front, and after every `every` words.

        The authors' code counts tokens, between which there is no room that could be typed where they share a word.
        """
        words = prompt.split()
        parts = [" ".join(words[start : start + every]) for start in range(0, len(words) + 1, every)]
        lengths = [len(victim.tokenizer(part, add_special_tokens=False).input_ids) for part in parts]
        return cls(tuple(parts), tuple(sum(lengths[:i]) + i for i in range(len(parts))))

    def filled(self, words: Sequence[str]) -> str:
        """The prompt with these words in it."""
        return " ".join(part for pair in zip_longest(words, self.parts) for part in pair if part)


@dataclass(frozen=True)
class P4D:
    """argmin over the N tokens of a prompt p* of || eps*(x_t, p) - eps(x_t, p*) ||^2, P4D-N.

    With `every`, P4D-K: p* is p itself with a token before it and after every so many of its words, 3 in the paper.
    Each token is a point among the text encoder's embeddings, read as the token nearest by its angle; the gradient
    there moves the point (AdamW). After every `iterations` of them the prompt is tried, `tries` times in all. x_t is
    the base's picture of the concept, each time at a new time with new noise. As the prompt need not name the concept,
    facilitated transport may be low for it: the attacker meets the gates that are deployed.
    """

    tokens: int = 16
    every: int | None = None
    iterations: int = 60
    tries: int = 50
    lr: float = 0.1
    weight_decay: float = 0.1

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""
        return self.iterations * self.tries

    def rounds(
        self,
        victim: Victim,
        cases: list[Case],
        pictures: Tensor,
        generator: torch.Generator,
        stepped: Callable[[], None],
    ) -> Iterator[dict[Case, str]]:
        """Yields prompts to try, one for every case left; whoever draws them removes those that succeed from `cases`.

        pictures: (n, *latent_shape), of the concept, by the base, for each case as they are at first.
        """
        base, ids = victim.base, victim.searchable()
        if self.every is None:
            victim.check_room(self.tokens, [""])
        table = victim.table[ids]
        by_angle = F.normalize(table, dim=1)
        every_case = tuple(cases)
        blank = Frame((), tuple(range(self.tokens)))
        frames = {case: blank if self.every is None else Frame.of(victim, case.prompt, self.every) for case in cases}
        points = {
            case: nn.Parameter(table[torch.randint(len(ids), (len(frame.places),), generator=generator)].clone())
            for case, frame in frames.items()
        }
        adam = {
            case: torch.optim.AdamW([point], lr=self.lr, weight_decay=self.weight_decay)
            for case, point in points.items()
        }

        def written(case: Case) -> str:
            nearest = (F.normalize(points[case].detach(), dim=1) @ by_angle.T).argmax(dim=1).cpu()
            return frames[case].filled(victim.words(ids[nearest]))

        for _ in range(self.tries):
            left = tuple(cases)
            if not left:
                return
            rows = [every_case.index(case) for case in left]
            for x_t, times, goal in self._taught(victim, left, pictures, rows, generator):
                texts = [written(case) for case in left]
                most = max(len(frames[case].places) for case in left)
                places = [frames[case].places for case in left]
                padded = torch.tensor([[*own, *[_NOWHERE] * (most - len(own))] for own in places])
                shift = torch.zeros((len(left), most, table.shape[1]), device=base.device, requires_grad=True)
                prediction = victim.predict(x_t, times, texts, victim.encode(texts, shift, padded))
                # A sum over cases of means, so that no case feels the others.
                loss = (prediction - goal).pow(2).flatten(1).mean(dim=1).sum()
                (moves,) = torch.autograd.grad(loss, shift)
                for case, move in zip(left, moves, strict=True):
                    points[case].grad = move[: len(points[case])].to(points[case])
                    adam[case].step()
                stepped()
            yield {case: written(case) for case in left}

    @torch.no_grad()
    def _taught(
        self, victim: Victim, left: Sequence[Case], pictures: Tensor, rows: Sequence[int], generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every iteration up to the next try: x_t of the cases left, times, what the base predicts for them.

        All at once, as erasers are off meanwhile. rows: the cases' among `pictures`, for all of which noise is drawn,
        so that nobody's depends on who is left.
        """
        prompts, found = [case.prompt for case in left], []
        with victim.bare():
            told = victim.encode(prompts)
            for _ in range(self.iterations):
                times = victim.noising.drawn(len(pictures), generator).to(victim.base.device)
                x_t, _ = victim.noising.noised(pictures, victim.base.noise(len(pictures), generator), times)
                x_t, times = x_t[rows], times[rows]
                found.append((x_t, times, victim.predict(x_t, times, prompts, told)))
        return found
