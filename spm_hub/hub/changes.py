"""Says what a new version of an eraser changes, and which changes need the user's consent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spm_hub.adapters.manifest import Manifest

if TYPE_CHECKING:
    import torch

    from spm_hub.adapters.adapter import Adapter

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
    one, other = old.manifest.gate.strength, new.manifest.gate.strength
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
    import torch

    inner = torch.zeros(3, dtype=torch.float64)  # one by one, other by other, one by other
    for path in one.increments.keys() & other.increments.keys():
        first, second = _factors(one.increments[path]), _factors(other.increments[path])
        if first is None or second is None or _shape(first) != _shape(second):
            continue
        inner += torch.stack([_inner(first, first), _inner(second, second), _inner(first, second)])
    size = float((inner[0] * inner[1]).sqrt())
    sign = _sign(one.manifest.gate.strength) * _sign(other.manifest.gate.strength)
    return sign * float(inner[2]) / size if size > 0 else None


def _factors(increment: object) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a change of weights as a product (out, r) @ (r, in), in float64; None for a mask."""
    import torch

    from spm_hub.adapters.increments import Dense, LowRank

    match increment:
        case LowRank(down, up):
            return up.double().flatten(1), down.double().flatten(1)
        case Dense(delta):
            flat = delta.double().flatten(1)
            return flat, torch.eye(flat.shape[1], dtype=torch.float64)
    return None


def _shape(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, int]:
    return factors[0].shape[0], factors[1].shape[1]


def _inner(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return sum_ij A_ij B_ij of A = up_a down_a and B = up_b down_b, without multiplying either out."""
    inner: torch.Tensor = ((one[0].T @ other[0]) * (one[1] @ other[1].T)).sum()
    return inner


def _in_gate(old: Manifest, new: Manifest) -> Iterable[str]:
    for key, one, other in (
        ("kind", old.default_gate, new.default_gate),
        ("rows", old.gate.rows, new.gate.rows),
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
