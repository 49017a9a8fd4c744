"""The moving average of the trained parameters, smoother than any one step.

It is saved in their place if the recipe asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """a <- decay a + (1 - decay) w after each step, over the named parameters of an increment.

    Of a dense increment it is that of the weights themselves, W + delta; of a low-rank one, that of its factors.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self._kept = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the current step in."""
        for key, parameter in self._parameters.items():
            self._kept[key].lerp_(parameter.detach(), 1 - self._decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are their averages."""
        now = {key: parameter.detach().clone() for key, parameter in self._parameters.items()}
        self._set(self._kept)
        try:
            yield
        finally:
            self._set(now)

    def state(self) -> dict[str, Tensor]:
        """For checkpoints."""
        return self._kept

    def load(self, state: Mapping[str, Tensor]) -> None:
        for key, kept in self._kept.items():
            kept.copy_(state[key])

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for key, parameter in self._parameters.items():
            parameter.copy_(values[key])
