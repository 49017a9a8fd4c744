"""Back-propagates through a whole sampling, from z_0 to the noise, in the memory of one step.

The sampling keeps the latents between its steps. On the way back each step is run again with a graph of its own, and
the gradient of its latents is passed to the step before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spm_hub.errors import ModelError

Step = Callable[[int, Tensor], Tensor]
"""The index-th step of a sampling: latents in, latents out. It is a function: no state, no noise of its own."""


@torch.no_grad()
def sample_latents(step: Step, noise: Tensor, steps: int) -> list[Tensor]:
    """Return the latents before, between and after the steps: the first is `noise`, the last z_0."""
    latents = [noise]
    for index in range(steps):
        latents.append(step(index, latents[-1]))
    return latents


def back_propagate(step: Step, latents: Sequence[Tensor], gradient: Tensor) -> None:
    """Add to the parameters' `grad` the gradients of a loss whose gradient at z_0 is `gradient`.

    latents: from `sample_latents`, with the same `step`. This equals back-propagation through all steps at once, needs
    the memory of one step, and runs each step once more.
    Raises ModelError if a step gives another result when it is run again: it keeps state, or draws its own noise.
    """
    for index in reversed(range(len(latents) - 1)):
        before = latents[index].detach().requires_grad_(index > 0)
        with torch.enable_grad():
            after = step(index, before)
        then = latents[index + 1]
        if float((after.detach() - then).norm()) > 1e-3 * float(then.detach().norm()):
            raise ModelError(
                f"step {index} of this model's scheduler gives another result when it is run again, so that nothing "
                "can be trained through it",
                mend="a model with another scheduler, or --method spm",
            )
        torch.autograd.backward(after, gradient.to(after.dtype))
        if before.grad is not None:
            gradient = before.grad
