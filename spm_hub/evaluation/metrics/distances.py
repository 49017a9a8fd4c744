"""Distances between two sets of pictures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_KERNEL_ROWS = 1000


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the Fréchet distance of two sets of features, (n, d) and (m, d), computed in float64.

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, Eq. 6). With features of an
    Inception network this is FID. It is biased upwards for few pictures, so compare only distances of equal n and m.
    Raises ValueError unless both sets have two or more rows, and all rows have one width.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"both sets need two or more rows of one width, not {first.shape} and {second.shape}")
    apart = (first.double().mean(0) - second.double().mean(0)).pow(2).sum()
    one, two = _deviations(first), _deviations(second)
    # With C1 = A^T A and C2 = B^T B, the trace of (C1 C2)^(1/2) is the sum of the singular values of A B^T. This avoids
    # the square root of a covariance with rounding errors.
    mixed = torch.linalg.svdvals(one @ two.T).sum()
    return float(apart + one.pow(2).sum() + two.pow(2).sum() - 2 * mixed)


def _deviations(features: Tensor) -> Tensor:
    """Return A of shape (min(n, d), d) with A^T A the covariance of `features` (n, d)."""
    centred = features.double() - features.double().mean(0)
    reduced: Tensor = torch.linalg.qr(centred / math.sqrt(len(features) - 1), mode="r").R
    return reduced


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared maximum mean discrepancy of pairs of features, (n, d) and (n, d), in float64.

    The U-statistic of Gretton et al. 2012 (JMLR 13, Lemma 6) with the kernel (x.y / d + 1)^3 of KID (Bińkowski et al.
    2018, arXiv 1801.01401). It leaves out each picture's own partner, which is drawn from the same noise: the estimate
    for independent sets would be below zero for pictures that erasers leave as they are; this one is 0.
    Raises ValueError unless both have the same number of rows, two or more, of one width.
    """
    if first.dim() != 2 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"both need the same two or more rows of one width, not {first.shape} and {second.shape}")
    one, two, width = first.double(), second.double(), first.shape[1]

    def different(left: Tensor, right: Tensor) -> Tensor:
        """Return the sum of the kernel over rows of different places, in parts: 30,000 have a billion pairs."""
        parts = [((part @ right.T / width + 1) ** 3).sum() for part in left.split(_KERNEL_ROWS)]
        same = (((left * right).sum(1) / width + 1) ** 3).sum()
        return torch.stack(parts).sum() - same

    total = different(one, one) + different(two, two) - 2 * different(one, two)
    return float(total / (len(one) * (len(one) - 1)))
