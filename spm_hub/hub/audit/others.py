"""Finds erasers that copy another one, or contain its change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.increments import LowRank
from spm_hub.adapters.manifest import Manifest
from spm_hub.attachment.gates.name_matcher import words_of

LEAST_COPIED = 0.97
"""Cosine from which one change is a copy of the other. Closed forms of neighbours (nudity, naked woman) have 0.9."""
_LEAST_ALIKE, _LEAST_SPANNED, _LEAST_HELD = 0.05, 0.99, 0.25
"""A change is looked for in another one if their cosine is at least the first. It is in it if, in modules with the
third share of its square or more, the other one's factors span at least the second share of it."""
_MOST_OF_DIMENSIONS = 0.25
"""Factors of more than this share of a weight's dimensions span anything."""
_LITTLE = frozenset("a an the of in on by at to and with style".split())


def about_others(index: int, together: Sequence[Adapter], products: Tensor) -> Iterator[str]:
    """Say which other erasers' changes one has, although it names other concepts.

    products: of all of `together`, as `inner_products` returns them.
    """
    one = together[index]
    lengths = products.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    cosines = (products[index] / lengths[index] / lengths).tolist()
    for other, cosine in zip(together, cosines, strict=True):
        if other is one or cosine < _LEAST_ALIKE or _related(one.manifest, other.manifest):
            continue
        target = other.manifest.concept.target
        if cosine >= LEAST_COPIED:
            yield f"its change is that of {other.name} (cosine {cosine:.2f}), which erases {target!r}"
        elif (held := _held(other, one)) >= _LEAST_HELD:
            yield f"{held:.0%} of the change of {other.name} is in it beside its own, and it does not name {target!r}"


def _related(one: Manifest, other: Manifest) -> bool:
    """Return whether two erasers name the same concept, or share a word of their names, or one names none."""
    ones, others = _words(one), _words(other)
    return not ones or not others or not ones.isdisjoint(others)


def _words(manifest: Manifest) -> frozenset[str]:
    return frozenset(word for name in manifest.concept.names for word in words_of(name)) - _LITTLE


def _held(change: Adapter, within: Adapter) -> float:
    """Return the share of a change, in its square, in modules where the factors of another one span it.

    Two trainings do not find the same directions: factors that span another change were made of it. 0 where they are of
    so high a rank that they span anything.
    """
    by_path = {flat(path): one for path, one in within.increments.items()}
    held = whole = 0.0
    for path, one in change.increments.items():
        if not isinstance(one, LowRank):
            return 0.0
        up, down = one.up.double().flatten(1), one.down.double().flatten(1)
        square = float(((up.T @ up) * (down @ down.T)).sum())
        whole += square
        other = by_path.get(flat(path))
        if isinstance(other, LowRank) and _spanned(up, down, other) >= _LEAST_SPANNED**2 * square:
            held += square
    return held / whole if whole else 0.0


def _spanned(up: Tensor, down: Tensor, other: LowRank) -> float:
    """Return the square of a product of factors after its projection to another one's factors."""
    columns, rows = other.up.double().flatten(1), other.down.double().flatten(1)
    fit = columns.shape[0] == up.shape[0] and rows.shape[1] == down.shape[1]
    if not fit or other.rank > _MOST_OF_DIMENSIONS * min(len(up), down.shape[1]):
        return 0.0
    left = torch.linalg.qr(columns)[0].T @ up
    right = torch.linalg.qr(rows.T)[0].T @ down.T
    return float(((left.T @ left) * (right.T @ right)).sum())
