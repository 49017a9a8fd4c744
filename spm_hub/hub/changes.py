"""Says what a new version of an eraser changes, and which changes need the user's consent."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import Manifest

if TYPE_CHECKING:
    from spm_hub.adapters.adapter import Adapter
    from spm_hub.adapters.increments import Increment

_OPPOSITE = -0.5
"""A cosine between the old and the new change of the weights: below, the new one does mostly the contrary."""


@dataclass(frozen=True)
class Changes:
    """The differences between two versions of an eraser, in words.

    said: all of them.  grave: those that make another eraser of it: another concept, or the opposite effect.
    """

    said: tuple[str, ...]
    grave: tuple[str, ...] = ()


def changes_between(old: Adapter, new: Adapter) -> Changes:
    """Return what changes from one version of an eraser to the next."""
    said, grave = [*_in_gate(old.manifest, new.manifest), *_in_increments(old.manifest, new.manifest)], []
    before, after = old.manifest.concept, new.manifest.concept
    for key in ("target", "surrogate", "kind"):
        one, other = getattr(before, key), getattr(after, key)
        if one != other:
            grave.append(f"concept.{key} {one!r} -> {other!r}")
    if dropped := _without(before.aliases, after.aliases):
        grave.append(f"it no longer knows the names {', '.join(map(repr, dropped))}")
    if added := _without(after.aliases, before.aliases):
        said.append(f"it also acts on the names {', '.join(map(repr, added))}")
    one, other = old.manifest.gate.full, new.manifest.gate.full
    if one != other:
        (grave if _sign(one) != _sign(other) else said).append(f"strength {one:g} -> {other:g}")
    elif (cosine := similarity(old, new)) is not None and cosine < _OPPOSITE:
        grave.append(f"its change of the weights is mostly the opposite of the old one (cosine {cosine:.2f})")
    if not (said or grave) and old.manifest.increment.sha256 != new.manifest.increment.sha256:
        said.append("the weights")
    return Changes((*grave, *said), tuple(grave))


def similarity(one: Adapter, other: Adapter) -> float | None:
    """Return the cosine between two erasers' changes of weights, by the signs of their strengths.

    It is that of all modules they share, as one vector, in float64. None if they share no module of one shape, or one
    of them changes nothing there. A mask's change depends on the base, so that masks do not count.
    """
    from spm_hub.adapters.overlap import inner_products  # which needs torch

    shared = one.increments.keys() & other.increments.keys()
    alike = [path for path in shared if _matrix(one.increments[path]) == _matrix(other.increments[path])]
    inner = inner_products([{path: each.increments[path] for path in alike} for each in (one, other)])
    size = float((inner[0, 0] * inner[1, 1]).sqrt())
    sign = _sign(one.manifest.gate.full) * _sign(other.manifest.gate.full)
    return sign * float(inner[0, 1]) / size if size > 0 else None


def _matrix(increment: Increment) -> tuple[int, int] | None:
    """Return the shape of a change as a matrix, by which a 1x1 convolution is a Linear; None for a mask."""
    shape = increment.weight_shape
    return None if shape is None else (shape[0], math.prod(shape[1:]))


def _in_gate(old: Manifest, new: Manifest) -> Iterable[str]:
    for key, one, other in (
        ("kind", old.default_gate, new.default_gate),
        ("rows", old.gate.rows, new.gate.rows),
        ("law", old.gate.law, new.gate.law),
    ):
        if one != other:
            yield f"gate.{key} {one} -> {other}"
    for text, prompts in (
        ("it no longer protects", _without(old.gate.protected, new.gate.protected)),
        ("it also has no effect on", _without(new.gate.protected, old.gate.protected)),
    ):
        if prompts:
            yield f"{text} {len(prompts)} prompt{'s' * (len(prompts) > 1)}: {', '.join(map(repr, prompts[:3]))}"


def _in_increments(old: Manifest, new: Manifest) -> Iterable[str]:
    before, after = old.increment, new.increment
    for key in ("kind", "rank", "dtype"):
        one, other = getattr(before, key), getattr(after, key)
        if one != other:
            yield f"increment.{key} {one} -> {other}"
    for text, paths in (
        ("it also changes", _without(after.modules, before.modules)),
        ("it no longer changes", _without(before.modules, after.modules)),
    ):
        if paths:
            yield f"{text} {len(paths)} module{'s' * (len(paths) > 1)}: {paths[0]}" + " ..." * (len(paths) > 1)
    if (old.base.family, old.base.id) != (new.base.family, new.base.id):
        yield f"base {old.base.family} {old.base.id} -> {new.base.family} {new.base.id}"


def _without(some: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    known = set(others)
    return tuple(one for one in some if one not in known)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)
