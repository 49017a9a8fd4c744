"""UCE: cross-attention edited in closed form, without a training loop.

Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.increments import LowRank


def edit(
    weights: Mapping[str, Tensor], edited: Tensor, goals: Tensor, kept: Tensor, ridge: float, rank: int | None = None
) -> dict[str, LowRank]:
    """The increments, float64, that make keys and values of `edited` those of `goals`; all concepts at once.

    weights: path to (out, d_text).  edited c_e, goals c_g (n, d_text), kept c_p (m, d_text): text states.
    ridge: lambda.  rank: of the increments; without it theirs is n, or d_text where that is less.

    W' = (lambda W + sum_e W c_g c_e^T + sum_p W c_p c_p^T) (lambda I + sum_e c_e c_e^T + sum_p c_p c_p^T)^-1.
    As W = W M M^-1, with M what is inverted, W' - W = [W (c_g - c_e)] [c_e^T M^-1]: a product of rank n, exactly; and a
    sum over concepts, so that each one's own terms, with the others among what is kept, are an eraser of its own.
    Where n is more than the rank asked for, W' - W = W K is cut to W U U^T K, U the first left singular vectors of
    K M^(1/2): no other product of that rank is nearer to K on the states that M is made of.
    """
    c, moves, p = edited.double(), (goals - edited).double(), kept.double()
    m = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + c.T @ c + p.T @ p
    right = torch.linalg.solve(m, c.T).T.contiguous()  # M is symmetric
    left = moves.T
    if len(c) > (most := min(c.shape[1], rank or c.shape[1])):
        whole = left @ right
        left = torch.linalg.svd(whole @ torch.linalg.cholesky(m)).U[:, :most]
        right = left.T @ whole
    return {path: LowRank(right, weight.double() @ left) for path, weight in weights.items()}
