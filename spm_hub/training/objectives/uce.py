"""UCE: cross-attention edited in closed form, without a training loop.

Gandikota et al., Unified Concept Editing in Diffusion Models, WACV 2024, arXiv 2308.14761.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.increments import LowRank


def edit(
    weights: Mapping[str, Tensor], edited: Tensor, goals: Tensor, kept: Tensor, ridge: float
) -> dict[str, LowRank]:
    """The increments, float64, that make keys and values of `edited` those of `goals`; all concepts at once.

    weights: path to (out, d_text).  edited c_e, goals c_g (n, d_text), kept c_p (m, d_text): text states.
    ridge: lambda.

    Eq. 7:  W' = (lambda W + sum_e W c_g c_e^T + sum_p W c_p c_p^T) (lambda I + sum_e c_e c_e^T + sum_p c_p c_p^T)^-1.
    As W = W M M^-1, with M what is inverted, W' - W = [W (c_g - c_e)] [c_e^T M^-1]: a product of rank n, exactly.
    """
    c, moves, p = edited.double(), (goals - edited).double(), kept.double()
    m = ridge * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + c.T @ c + p.T @ p
    down = torch.linalg.solve(m, c.T).T.contiguous()  # M is symmetric
    return {path: LowRank(down, weight.double() @ moves.T) for path, weight in weights.items()}
