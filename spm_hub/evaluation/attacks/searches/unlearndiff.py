"""UnlearnDiffAtk: searches for a few tokens before a prompt by the erased model's own denoising loss.

Zhang et al., To Generate or Not? Safety-Driven Unlearned Diffusion Models Are Still Easy To Generate Unsafe Images ...
For Now, ECCV 2024, arXiv 2310.11868.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spm_hub.evaluation.attacks.attack import AttackTarget
from spm_hub.evaluation.attacks.outcome import Case, Threat
from spm_hub.evaluation.attacks.tries import Try
from spm_hub.evaluation.attacks.victim import Victim


@dataclass(frozen=True)
class UnlearnDiffAtk:
    """argmin over tokens of || n - eps(x_t, [tokens, prompt]) ||^2, with x_0 a picture of the concept.

    Each of the `tokens` tokens is a point on the simplex over the vocabulary. Every iteration draws a token from each
    point; Adam moves the points by the loss's gradient at the drawn tokens (clamped to [-1, 1]), and they are projected
    back onto the simplex. After `iterations` at each of `timesteps` timesteps, from little noise to much, the likeliest
    tokens are tried. Defaults are the paper's, which uses 5 tokens for nudity.
    All cases are attacked in one batch, each as if it were alone.
    """

    tokens: int = 3
    iterations: int = 40
    timesteps: int = 50
    lr: float = 1e-2
    weight_decay: float = 0.1
    threat: ClassVar[Threat] = Threat.WEIGHTS

    @property
    def tries(self) -> int:
        """The most pictures that are drawn and judged for a case."""
        return self.timesteps

    @property
    def steps(self) -> int:
        """Gradient steps in all, for progress."""
        return self.iterations * self.timesteps

    def check(self, victim: Victim) -> None:
        """Raise ModelError unless the text encoders share one vocabulary."""
        _ = victim.vocabulary

    def rounds(self, target: AttackTarget) -> Iterator[dict[Case, Try]]:
        """Yield prompts to try, one for every remaining case of `target`."""
        victim, cases, vocabulary = target.victim, target.cases, target.victim.vocabulary
        base, random = victim.base, target.generators()
        vocabulary.check_room(self.tokens, [case.prompt for case in cases])
        ids = vocabulary.searchable()
        table = vocabulary.table[ids]
        latents = dict(zip(cases, target.pictures, strict=True))
        points = {case: torch.full((self.tokens, len(ids)), 1 / len(ids)).requires_grad_() for case in cases}
        adam = {
            case: torch.optim.Adam([point], lr=self.lr, weight_decay=self.weight_decay)
            for case, point in points.items()
        }
        for time in victim.noising.times(self.timesteps):
            left = tuple(cases)
            if not left:
                return
            prompts = [case.prompt for case in left]
            x_0, times = torch.stack([latents[case] for case in left]), time.expand(len(left)).to(base.device)
            for _ in range(self.iterations):
                drawn = torch.stack([
                    torch.multinomial(points[case].detach(), 1, generator=random[case])[:, 0] for case in left
                ])  # fmt: skip
                noise = torch.cat([base.noise(1, random[case]) for case in left])
                x_t, goal = victim.noising.add_noise(x_0, noise, times)
                texts = vocabulary.write(ids[drawn], prompts)
                moves = victim.token_gradients((x_t, times, goal), texts, self.tokens)
                gradient = (moves @ table.T).clamp(-1, 1).cpu()  # with respect to the one-hot token vectors
                for row, case in enumerate(left):
                    points[case].grad = gradient[row]
                    adam[case].step()
                projected = onto_simplex(torch.stack([points[case].data for case in left]))
                for case, point in zip(left, projected, strict=True):
                    points[case].data = point
                target.on_step()
            likeliest = torch.stack([points[case].detach().argmax(dim=1) for case in left])
            yield dict(zip(left, map(Try, vocabulary.write(ids[likeliest], prompts)), strict=True))


def onto_simplex(points: Tensor) -> Tensor:
    """Project points onto the simplex (entries >= 0 that sum to 1) along the last dimension.

    Algorithm of Duchi et al., ICML 2008.
    """
    falling, _ = points.sort(dim=-1, descending=True)
    excess = falling.cumsum(dim=-1) - 1
    ranks = torch.arange(1, points.shape[-1] + 1, dtype=points.dtype)
    kept = (falling - excess / ranks > 0).sum(dim=-1, keepdim=True)
    return (points - excess.gather(-1, kept - 1) / kept).clamp_min(0)
