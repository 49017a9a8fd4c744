"""Compares erasers' changes of the weights with each other, and finds those that take back another's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import Dense, Increment, LowRank

LEAST_OPPOSED, LEAST_SHARE = -0.5, 0.3
"""Two erasers undo each other if the cosine of their changes is at most the first. The greater one undoes the other if
it takes back so much of its change, at a cosine of at most minus this share."""


@dataclass(frozen=True)
class Undoing:
    """An eraser that takes back another's change: the indices of both, and the cosine of their changes."""

    by: int
    of: int
    cosine: float


def undoings(products: Tensor, strengths: Sequence[float]) -> list[Undoing]:
    """Return every eraser that takes back another's change, in the order of `products`.

    products: as `inner_products` returns them. strengths: the factor of each eraser.
    """
    norms = products.diagonal().clamp_min(0.0).sqrt() * torch.tensor(strengths, dtype=torch.float64).abs()
    signs = torch.tensor([math.copysign(1.0, strength) for strength in strengths], dtype=torch.float64)
    lengths = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosines = products / lengths[:, None] / lengths * signs[:, None] * signs
    taken = -cosines * norms[:, None] / norms.clamp_min(torch.finfo(torch.float64).tiny)
    hidden = (cosines <= -LEAST_SHARE) & (taken >= LEAST_SHARE) & (norms[:, None] > norms)
    undone = (cosines <= LEAST_OPPOSED) | hidden
    both = (undone & (norms > 0) & (norms > 0)[:, None]).nonzero().tolist()
    return [Undoing(by, of, float(cosines[by, of])) for by, of in both]


def inner_products(erasers: Sequence[Mapping[str, Increment]]) -> Tensor:
    """Return the inner products of all erasers' changes of the weights: (erasers, erasers), float64.

    erasers: the increments of each, by module path; paths count as equal however a program writes them. A change of a
    bias and a mask, whose change depends on the base, count as none.
    """
    total = torch.zeros(len(erasers), len(erasers), dtype=torch.float64)
    by_module: dict[str, list[tuple[int, Increment]]] = defaultdict(list)
    for index, increments in enumerate(erasers):
        for path, increment in increments.items():
            by_module[flat(path)].append((index, increment))
    for found in by_module.values():
        _add_low_rank(total, [(index, one) for index, one in found if isinstance(one, LowRank)])
        for index, one in found:
            if isinstance(one, Dense):
                _add_dense(total, index, one, found)
    return total


def _add_low_rank(total: Tensor, found: Sequence[tuple[int, LowRank]]) -> None:
    """Add the products of one module's low-rank changes, all pairs at once.

    <U V, X Y> is the sum of (U'X) * (V Y'), which never makes a whole weight.
    """
    by_shape: dict[tuple[int, int], list[tuple[int, LowRank]]] = defaultdict(list)
    for index, one in found:
        by_shape[one.up.shape[0], one.down[0].numel()].append((index, one))
    for group in by_shape.values():
        ups = torch.cat([one.up.double().flatten(1).T for _, one in group])
        downs = torch.cat([one.down.double().flatten(1) for _, one in group])
        rows = torch.tensor([index for index, one in group for _ in range(one.rank)])
        products = (ups @ ups.T) * (downs @ downs.T)
        total.index_put_((rows[:, None], rows[None]), products, accumulate=True)


def _add_dense(total: Tensor, index: int, one: Dense, found: Sequence[tuple[int, Increment]]) -> None:
    """Add the products of a whole change with the low-rank ones, and the whole ones before it."""
    whole = one.delta.double().reshape(len(one.delta), -1)  # a norm's has one dimension
    for other, increment in found:
        if isinstance(increment, LowRank):
            up, down = increment.up.double().flatten(1), increment.down.double().flatten(1)
            if whole.shape == (len(up), down.shape[1]):
                product = float(((whole @ down.T) * up).sum())
                total[index, other] += product
                total[other, index] += product
        elif isinstance(increment, Dense) and other <= index and increment.delta.numel() == whole.numel():
            product = float((whole * increment.delta.double().reshape(whole.shape)).sum())
            total[index, other] += product
            if other != index:
                total[other, index] += product
