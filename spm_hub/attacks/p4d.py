"""P4D: a whole prompt under which the erased model predicts what the base predicts for the concept.

Chin et al., Prompting4Debugging: Red-Teaming Text-to-Image Diffusion Models by Finding Problematic Prompts, ICML 2024,
arXiv 2309.06135.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .outcome import Case
from .victim import Victim


@dataclass(frozen=True)
class P4D:
    """argmin over the N tokens of a prompt p* of || eps*(x_t, p) - eps(x_t, p*) ||^2, P4D-N.

    Each token is a point among the text encoder's embeddings, read as the nearest token; the gradient there moves the
    point (AdamW). After every `iterations` of them the prompt is tried, `tries` times in all. x_t are the base's
    pictures of the concept at `timesteps` timesteps. As the prompt need not name the concept, facilitated transport may
    be low for it: the attacker meets the gates that are deployed.
    """

    tokens: int = 16
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
        first = torch.randint(len(ids), (len(cases), self.tokens), generator=generator)
        points = {case: nn.Parameter(table[rows].clone()) for case, rows in zip(cases, first, strict=True)}
        adam = {
            case: torch.optim.AdamW([point], lr=self.lr, weight_decay=self.weight_decay)
            for case, point in points.items()
        }

        def written(left: tuple[Case, ...]) -> list[str]:
            nearest = torch.stack([torch.cdist(points[case].detach(), table).argmin(dim=1).cpu() for case in left])
            return victim.write(ids[nearest], [""] * len(left))

        for _ in range(self.tries):
            left = tuple(cases)
            if not left:
                return
            for _ in range(self.iterations):
                row = int(torch.randint(self.timesteps, (), generator=generator))
                x_t, times, goal = (torch.stack([taught[case][part][row] for case in left]) for part in range(3))
                texts = written(left)
                shift = torch.zeros((len(left), self.tokens, table.shape[1]), device=base.device, requires_grad=True)
                prediction = victim.predict(x_t, times, texts, victim.encode(texts, shift))
                # A sum over cases of means, so that no case feels the others.
                loss = (prediction - goal).pow(2).flatten(1).mean(dim=1).sum()
                (moves,) = torch.autograd.grad(loss, shift)
                for case, move in zip(left, moves, strict=True):
                    points[case].grad = move.to(points[case])
                    adam[case].step()
                stepped()
            yield dict(zip(left, written(left), strict=True))

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
