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

LEAST_OPPOSED, LEAST_SHARE = -0.5, 0.4
"""Two erasers undo each other if the cosine of their changes is at most the first. The greater one undoes the other if
it takes back so much of its change, at a cosine of at most minus this share."""
LEAST_TAKEN = 0.05
"""An eraser of fewer modules undoes another if their cosine on these is at most `LEAST_OPPOSED`, and it takes back so
much of the other's whole change."""
LEAST_TURNED = 0.15
"""Two erasers undo each other in some of their modules, as they do the same in others, if the products of both kinds of
modules are so much of the product of their norms."""


@dataclass(frozen=True)
class Undoing:
    """An eraser that takes back another's change: the indices of both, and the cosine of their changes."""

    by: int
    of: int
    cosine: float

    def describe(self, names: Sequence[str]) -> str:
        """Return a sentence that names both. names: of all erasers that were compared."""
        by, of = names[self.by], names[self.of]
        return f"{by} undoes {of}: its change of the weights is the opposite (cosine {self.cosine:.2f})"


def undoings(
    products: Tensor,
    strengths: Sequence[float],
    norms_by_module: Sequence[Mapping[str, float]] = (),
    opposed: Tensor | None = None,
) -> list[Undoing]:
    """Return every eraser that takes back another's change, in the order of `products`.

    products, opposed: as `inner_products` and `products_and_opposed` return them; without the second, those that take
    back another in some modules, and repeat it in others, are not found. strengths: the factor of each eraser.
    norms_by_module: the `squared_norms` of each, to find those that take back another in fewer modules.
    """
    norms = products.diagonal().clamp_min(0.0).sqrt() * torch.tensor(strengths, dtype=torch.float64).abs()
    signs = torch.tensor([math.copysign(1.0, strength) for strength in strengths], dtype=torch.float64)
    lengths = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosines = products / lengths[:, None] / lengths * signs[:, None] * signs
    taken = -cosines * norms[:, None] / norms.clamp_min(torch.finfo(torch.float64).tiny)
    hidden = (cosines <= -LEAST_SHARE) & (taken >= LEAST_SHARE) & (norms[:, None] > norms)
    undone = (cosines <= LEAST_OPPOSED) | hidden
    if opposed is not None:
        turned = torch.minimum(opposed, products + opposed) / lengths[:, None] / lengths
        undone |= (turned >= LEAST_TURNED) & (turned * norms[:, None] >= LEAST_TURNED * norms)
    if norms_by_module:
        shared = _shared_squares(norms_by_module)  # of each row's changes, in the modules of each column
        there = (shared * shared.T).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        opposed = products * signs[:, None] * signs / there <= LEAST_OPPOSED
        undone |= opposed & (taken >= LEAST_TAKEN)
    both = (undone & (norms > 0) & (norms > 0)[:, None]).nonzero().tolist()
    return [Undoing(by, of, float(cosines[by, of])) for by, of in both]


def inner_products(
    erasers: Sequence[Mapping[str, Increment]], others: Sequence[Mapping[str, Increment]] | None = None
) -> Tensor:
    """Return the inner products of erasers' changes with others': (erasers, others), float64.

    erasers, others: the increments of each, by module path; paths count as equal however a program writes them. Without
    `others` they are compared with each other. A mask, whose change depends on the base, counts as none.
    """
    return products_and_opposed(erasers, others)[0]


def products_and_opposed(
    erasers: Sequence[Mapping[str, Increment]], others: Sequence[Mapping[str, Increment]] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the `inner_products`, and how much of each is opposed: (erasers, others) both.

    The second is the sum of the products of those modules in which the two changes are opposed, without its sign.
    """
    total = torch.zeros(len(erasers), len(erasers if others is None else others), dtype=torch.float64)
    opposed = torch.zeros_like(total)
    rows, columns = _by_module(erasers), _by_module(erasers if others is None else others)
    for path, found in rows.items():
        if path in columns:
            of_module = torch.zeros_like(total)
            _add_low_rank(of_module, _low_rank(found), _low_rank(columns[path]))
            _add_dense(of_module, found, columns[path])
            total += of_module
            opposed -= of_module.clamp_max_(0.0)
    return total, opposed


def _shared_squares(norms_by_module: Sequence[Mapping[str, float]]) -> Tensor:
    """Return the squared norm of each eraser's change in the modules that each other one changes."""
    columns = {path: index for index, path in enumerate({flat(path) for norms in norms_by_module for path in norms})}
    squares = torch.zeros(len(norms_by_module), len(columns), dtype=torch.float64)
    for row, norms in enumerate(norms_by_module):
        squares[row, [columns[flat(path)] for path in norms]] = torch.tensor(list(norms.values()), dtype=torch.float64)
    return squares @ (squares > 0).double().T


def squared_norms(increments: Mapping[str, Increment]) -> dict[str, float]:
    """Return the squared norm of each module's change, its bias included, by path; 0 for a mask."""
    norms = {}
    for path, one in increments.items():
        if isinstance(one, LowRank):
            up, down = one.up.double().flatten(1), one.down.double().flatten(1)
            norms[path] = float(((up.T @ up) * (down @ down.T)).sum())
        else:
            norms[path] = _product(one, one)
    return norms


_Found = Sequence[tuple[int, Increment]]
"""Changes of one module, each with the number of its eraser."""


def _by_module(erasers: Sequence[Mapping[str, Increment]]) -> dict[str, list[tuple[int, Increment]]]:
    by_module: dict[str, list[tuple[int, Increment]]] = defaultdict(list)
    for index, increments in enumerate(erasers):
        for path, increment in increments.items():
            by_module[flat(path)].append((index, increment))
    return by_module


def _low_rank(found: _Found) -> dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]:
    """Return the factors of low-rank changes, one rank a row, and their erasers' numbers; by shape."""
    by_shape: dict[tuple[int, int], list[tuple[int, LowRank]]] = defaultdict(list)
    for index, one in found:
        if isinstance(one, LowRank):
            by_shape[one.up.shape[0], one.down[0].numel()].append((index, one))
    return {
        shape: (
            torch.cat([one.up.detach().cpu().flatten(1).T for _, one in group]).double(),
            torch.cat([one.down.detach().cpu().flatten(1) for _, one in group]).double(),
            torch.tensor([index for index, one in group for _ in range(one.rank)]),
        )
        for shape, group in by_shape.items()
    }


def _add_low_rank(
    total: Tensor,
    rows: Mapping[tuple[int, int], tuple[Tensor, Tensor, Tensor]],
    columns: Mapping[tuple[int, int], tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Add the products of one module's low-rank changes, all pairs at once.

    <U V, X Y> is the sum of (U'X) * (V Y'), which never makes a whole weight.
    """
    for shape in rows.keys() & columns.keys():
        (ups, downs, row), (other_ups, other_downs, column) = rows[shape], columns[shape]
        products = (ups @ other_ups.T) * (downs @ other_downs.T)
        total.index_put_((row[:, None], column[None]), products, accumulate=True)


def _add_dense(total: Tensor, rows: _Found, columns: _Found) -> None:
    """Add the products of one module's changes for all pairs with a whole one."""
    for index, one in rows:
        for other, increment in columns:
            total[index, other] += _product(one, increment)


def _product(one: Increment, other: Increment) -> float:
    """Return the product of a whole change with another one; 0 for other pairs."""
    if isinstance(one, LowRank) and isinstance(other, Dense):
        one, other = other, one
    if not isinstance(one, Dense):
        return 0.0
    whole = one.delta.detach().cpu().double().reshape(len(one.delta), -1)  # a norm's has one dimension
    if isinstance(other, LowRank):
        up, down = other.up.cpu().double().flatten(1), other.down.cpu().double().flatten(1)
        return float(((whole @ down.T) * up).sum()) if whole.shape == (len(up), down.shape[1]) else 0.0
    if not isinstance(other, Dense) or other.delta.numel() != whole.numel():
        return 0.0
    product = (whole * other.delta.detach().cpu().double().reshape(whole.shape)).sum()
    if one.delta_bias is not None and other.delta_bias is not None:
        product += one.delta_bias.detach().cpu().double() @ other.delta_bias.detach().cpu().double()
    return float(product)
