"""Back-propagation through a whole sampling, from z_0 to the noise, in the memory of one step.

What is kept of the way down are the latents between the steps. On the way back each step is run again, with a graph of
its own, and what it says of its latents is handed on to the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spm_hub.errors import ModelError

Step = Callable[[int, Tensor], Tensor]
"""The index-th step of a sampling: latents in, latents out. The same in gives the same out, noise and all."""


@torch.no_grad()
def sampled(step: Step, noise: Tensor, steps: int) -> list[Tensor]:
    """The latents before, between and after the steps: the first is `noise`, the last z_0."""
    latents = [noise]
    for index in range(steps):
        latents.append(step(index, latents[-1]))
    return latents


def back_propagate(step: Step, latents: Sequence[Tensor], gradient: Tensor) -> None:
    """Adds to the parameters' `grad` what they have of a loss whose gradient at z_0 is `gradient`.

    latents: of `sampled`, with the same `step`. Equal to back-propagation through all steps at once, at the memory of
    one and the price of running each once more.
    Raises ModelError where a step run again is not what it was: it remembers, or draws noise of its own.
    """
    for index in reversed(range(len(latents) - 1)):
        before = latents[index].detach().requires_grad_(index > 0)
        with torch.enable_grad():
            after = step(index, before)
        then = latents[index + 1]
        if float((after.detach() - then).norm()) > 1e-3 * float(then.detach().norm()):
            raise ModelError(
                f"step {index} of this model's scheduler gives something else when it is run again, so that nothing "
                "can be trained through it",
                mend="a model with another scheduler, or --method spm",
            )
        torch.autograd.backward(after, gradient.to(after.dtype))
        if before.grad is not None:
            gradient = before.grad
