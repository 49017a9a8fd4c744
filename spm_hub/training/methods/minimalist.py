"""Minimalist concept erasure: nothing counts but what is drawn in the end.

Zhang et al., Minimalist Concept Erasure in Generative Models, ICML 2025, arXiv 2507.13386.
"""

from __future__ import annotations

from torch import Tensor


def final_latent_losses(drawn: Tensor, goals: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
    """What there is to erase and what there is to keep, each summed over its rows; the loss is erase + beta * keep.

    drawn z_0, goals: (n, *latent_shape).  concept: (n,) bool, which rows are prompts of the concept.

    erase: MSE(z_0(c), goal), the goal being what the base draws of the same noise without the concept.  keep:
    MSE(z_0(n), z_0*(n)) of the other prompts, z_0* being what the base draws itself.
    """
    each = (drawn - goals).pow(2).flatten(1).mean(1)
    return each[concept].sum(), each[~concept].sum()
