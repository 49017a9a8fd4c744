"""Asks a base whether pictures show a concept, or other names: whether the name explains them best.

No judge is needed: a diffusion model is a classifier of its own pictures (Li et al., arXiv 2303.16203). A picture's
subject is settled where noise is strong, and there alone it is asked: at weaker noise the error is that of blur and
texture, which every half-erased picture has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from spm_hub.io.wording import counted
from spm_hub.training.data.q_sample import add_noise, true_prediction
from spm_hub.training.verdict import KNOWN, are_few, is_recognised

if TYPE_CHECKING:
    from torch import Tensor

    from spm_hub.training.base_model import TeacherModel

_TIMES = 999
"""Steps of the schedule that times are taken from."""
_ASKED, _ASKED_OF_MANY, _STRONG = 8, 2, 1 / 2
"""Times that are asked at, evenly spaced in this share of the schedule, from pure noise on."""


@dataclass(frozen=True)
class Recognition:
    """The counts of pictures in which a base recognises a concept.

    erased, own: of those with the eraser fully on, and of its own without it; of_erased, of_own: all such pictures.
    """

    erased: int
    of_erased: int
    own: int
    of_own: int

    @property
    def is_known(self) -> bool:
        """True if the base recognises the concept in its own pictures, so that its answer means something."""
        return self.own >= KNOWN * self.of_own

    @property
    def is_still_there(self) -> bool:
        """True if the base recognises the concept in more erased pictures than by accident."""
        return is_recognised(self.erased / self.of_erased, self.own / self.of_own)

    def describe(self, concept: str) -> str:
        """Return it as a clause."""
        if not self.is_known:
            return (
                f"the base recognises {concept} in {self.own} of {counted(self.of_own, 'picture')} of its own: unclear"
            )
        still = "still " if self.is_still_there else ""
        many = f"{self.erased or 'none'} of {counted(self.of_erased, 'picture')}"
        return f"the base {still}recognises {concept} in {many} with the eraser fully on"


@dataclass(frozen=True)
class OthersRecognised:
    """The counts of other names that a base recognises in their pictures, with an eraser fully on.

    kept: of those that it recognises without the eraser; known: all of these.
    """

    kept: int
    known: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> OthersRecognised:
        """Count them, of the same names without the eraser and with it."""
        return cls(sum(both for one, both in zip(before, after, strict=True) if one), sum(before))

    def describe(self) -> str:
        """Return it as a clause."""
        few = are_few(self.kept, self.known)
        if few is None:
            return "the base tells too few other names apart to say what the eraser costs them without a gate"
        names = f"{self.kept} of {self.known} other names"
        return f"without a gate the base would recognise {f'only {names}: keep its gate' if few else names}"


def recognised(base: TeacherModel, pictures: Tensor, prompt: str, others: Sequence[str], seed: int) -> list[bool]:
    """Return of each picture whether `prompt` explains it better than every other prompt.

    pictures: latents x_0 (n, *latent_shape), as the pipeline gives them for `output_type="latent"`.  others: not empty.
    The better prompt is the one whose predictions of the same noise, at a few strong noises, have the smaller squared
    error. No eraser may be attached.
    """
    errors = _errors(base, pictures, (prompt, *others), seed, _ASKED)
    return [bool(own < least) for own, least in zip(errors[0], errors[1:].amin(0), strict=True)]


def named(base: TeacherModel, pictures: Tensor, prompts: Sequence[str], others: Sequence[str], seed: int) -> list[bool]:
    """Return of each picture whether its own prompt explains it best.

    The rivals are the prompts of all other pictures, and `others`.

    pictures: (n, *latent_shape), one for each of the n different prompts; the rest is as in `recognised`. With so many
    rivals a few noises are enough.
    """
    errors = _errors(base, pictures, (*prompts, *others), seed, _ASKED_OF_MANY)
    return [int(best) == row for row, best in enumerate(errors.argmin(0))]


@torch.no_grad()
def _errors(base: TeacherModel, pictures: Tensor, prompts: Sequence[str], seed: int, asked: int) -> Tensor:
    """Return the squared error of each prompt for each picture, (prompts, n) in float64 on the CPU."""
    scheduler = base.scheduler(base.steps(_TIMES))
    generator = torch.Generator().manual_seed(seed)
    count, pictures = len(pictures), pictures.to(base.device)
    errors = torch.zeros(len(prompts), count, dtype=torch.float64)
    for number in range(asked):
        place = int((number + 0.5) / asked * _STRONG * len(scheduler.timesteps))
        noise = base.noise(count, generator)
        noisy, times = add_noise(scheduler, pictures, noise, torch.full((count,), place))
        truth = true_prediction(scheduler, pictures, noise, times)
        for row, text in enumerate(prompts):
            predicted = base.predict(noisy, times, base.encode([text])[0].expand(count))
            errors[row] += (predicted - truth).double().pow(2).flatten(1).mean(1).cpu()
    return errors
