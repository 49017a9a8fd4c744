"""P4D: a whole prompt under which the erased model predicts what the base predicts for the concept.

Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, ICML 2024,
arXiv 2309.06135.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from .outcome import Case
from .victim import Victim

_NOWHERE = 2**31
"""A place beyond every window."""


@dataclass(frozen=True)
class Frame:
    """A prompt with room for one token after each of its `parts`, as long as there are `places` (among its tokens)."""

    parts: tuple[str, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, victim: Victim, prompt: str, every: int) -> Frame:
        """Room after every `every` words, at least once."""
        words = prompt.split()
        parts = [" ".join(words[start : start + every]) for start in range(0, len(words), every)]
        lengths = [len(victim.tokenizer(part, add_special_tokens=False).input_ids) for part in parts]
        return cls(tuple(parts), tuple(sum(lengths[: i + 1]) + i for i in range(max(1, len(words) // every))))

    def filled(self, words: Sequence[str]) -> str:
        """The prompt with these words in it."""
        return " ".join(part for pair in zip_longest(self.parts, words) for part in pair if part)


@dataclass(frozen=True)
class P4D:
    """argmin over the N tokens of a prompt p* of || eps*(x_t, p) - eps(x_t, p*) ||^2, P4D-N.

    With `every`, P4D-K: p* is p itself with a token after every so many of its words, 3 in the paper.
    Each token is a point among the text encoder's embeddings, read as the nearest token; the gradient there moves the
    point (AdamW). After every `iterations` of them the prompt is tried, `tries` times in all. x_t are the base's
    pictures of the concept at `timesteps` timesteps. As the prompt need not name the concept, facilitated transport may
    be low for it: the attacker meets the gates that are deployed.
    """

    tokens: int = 16
    every: int | None = None
    iterations: int = 60
    tries: int = 50
    timesteps: int = 25
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
        table = victim.table[ids]
        taught = {
            case: self._taught(victim, case, picture, generator) for case, picture in zip(cases, pictures, strict=True)
        }
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
            nearest = torch.cdist(points[case].detach(), table).argmin(dim=1).cpu()
            return frames[case].filled(victim.words(ids[nearest]))

        for _ in range(self.tries):
            left = tuple(cases)
            if not left:
                return
            for _ in range(self.iterations):
                row = int(torch.randint(self.timesteps, (), generator=generator))
                x_t, times, goal = (torch.stack([taught[case][part][row] for case in left]) for part in range(3))
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
        self, victim: Victim, case: Case, picture: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_t of a picture at every timestep, the times, and the base's predictions for the case's prompt there."""
        times = torch.stack(victim.noising.times(self.timesteps)).to(victim.base.device)
        noise = victim.base.noise(self.timesteps, generator)
        x_t, _ = victim.noising.noised(picture.expand(self.timesteps, *picture.shape), noise, times)
        prompts = [case.prompt] * self.timesteps
        with victim.bare():
            return x_t, times, victim.predict(x_t, times, prompts, victim.encode(prompts))
