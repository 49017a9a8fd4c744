"""Audits erasers: puts the checks of their weights, names, claims and of each other into words."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.module_names import contradicted, flat
from spm_hub.adapters.increments import Dense
from spm_hub.adapters.manifest import Manifest
from spm_hub.adapters.overlap import products_and_opposed, squared_norms, undoings
from spm_hub.attachment.gates.bank import sentences
from spm_hub.attachment.gates.name_matcher import words_of
from spm_hub.attachment.objections import (
    MOST_NAMES,
    MOST_PROTECTED,
    about_changes,
    beyond_limits,
    matcher_of,
)
from spm_hub.hub.audit.effect import LEAST_COSINE, towards_surrogate
from spm_hub.hub.audit.local_base import LocalBase, local_base
from spm_hub.hub.audit.others import about_others
from spm_hub.models.aliases import ALIASES

MOST_ACTING = 0.02
"""Greatest share of the general sentences with a name of the eraser that nothing is said about."""

LEAST_LEFT = 0.5
"""Share of a weight, in its norm, that an honest eraser leaves."""

MOST_SHIFT = 0.1
"""Greatest shift of a bias, as a share of its weight's norm, that may be more than the change of the weight itself."""

LEAST_MODULES, MOST_IN_ONE = 8, 0.9
"""An eraser of so many modules that has more than this share of its squared change in one of them is suspected."""


@dataclass(frozen=True)
class Findings:
    """The audit of one eraser.

    problems: what a user should know before using it, in words; empty if there is nothing to say. undoes: the names of
    other erasers whose change it takes back. greatest_change: of a weight, as a share of that weight's norm, and the
    module it is in; None without a base. norm: of the whole change, at its strength. outside: the share of the squared
    norm outside cross-attention, for information. acting: the share of the general sentences with one of its names.
    spares: the names of other erasers whose concepts its protected prompts name, for information.
    """

    name: str
    problems: tuple[str, ...]
    undoes: tuple[str, ...]
    norm: float
    outside: float
    acting: float
    greatest_change: tuple[float, str] | None = None
    spares: tuple[str, ...] = ()


def audit(
    adapters: Sequence[Adapter],
    *,
    beside: Sequence[Adapter] = (),
    model: str | None = None,
) -> list[Findings]:
    """Audit erasers, each of them also against all the others.

    beside: further erasers to compare these with, which are not audited themselves.
    model: the base whose weights the changes are compared with; None is the one that each was trained on. A base that
    is not on this machine is left out.
    Reads all tensors of the erasers. Raises AdapterFileError for a file that is damaged.
    """
    together = [*adapters, *beside]
    strengths = [adapter.manifest.gate.full for adapter in together]
    norms = [squared_norms(adapter.increments) for adapter in together]
    products, opposed = products_and_opposed([adapter.increments for adapter in together])
    undone = undoings(products, strengths, norms, opposed)
    known = [adapter.manifest for adapter in together]
    base_of = cache(local_base)
    found = []
    for index, adapter in enumerate(adapters):
        undoes = [(together[one.of].name, one.cosine) for one in undone if one.by == index]
        own = base_of(_public(adapter.manifest.base.id))
        base = own if model is None else base_of(model)
        squares = norms[index]
        changes = {} if base is None else _changes(adapter, squares, base)
        change = max(((size, path) for path, size in changes.items()), default=None)
        beyond = about_changes(changes)
        acting = _acting(adapter.manifest)
        problems = [
            *beyond_limits(adapter.manifest),
            *((beyond,) if beyond is not None else ()),
            *(() if base is None else _about_removal(adapter, changes, base)),
            *(f"its change and that of {name} undo each other (cosine {cosine:.2f})" for name, cosine in undoes),
            *about_others(index, together, products),
            *_about_one_module(squares),
            *(() if base is None else (*_about_biases(adapter, base), *_about_effect(adapter, base))),
            *_about_names(adapter.manifest, acting, known),
            *_about_explicit(adapter.manifest, known),
            *_about_claims(adapter, own),
        ]
        total = math.fsum(squares.values())
        inside = math.fsum(square for path, square in squares.items() if _is_cross_attention(path))
        norm, outside = abs(adapter.manifest.gate.full) * math.sqrt(total), 1 - inside / total if total else 0.0
        others_undone = tuple(name for name, _ in undoes)
        spares = _spared(adapter.manifest, known)
        found.append(Findings(adapter.name, tuple(problems), others_undone, norm, outside, acting, change, spares))
    return found


def _public(base: str) -> str:
    """Return a base's id if it is an alias or of the form owner/name, else nothing.

    A stranger must not name a folder to read.
    """
    return base if base in ALIASES or re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""


def _changes(adapter: Adapter, squares: Mapping[str, float], base: LocalBase) -> dict[str, float]:
    """Return how much an eraser changes the weights of its modules, as shares of their norms."""
    strength = abs(adapter.manifest.gate.full)
    return {
        path: strength * math.sqrt(max(square, 0.0)) / base.norm(path)
        for path, square in squares.items()
        if square and base.fits(path, adapter.increments[path])
    }


def _about_removal(adapter: Adapter, changes: Mapping[str, float], base: LocalBase) -> list[str]:
    """Name a module that an eraser leaves less than half of its weight, in the norm."""
    for path in (path for path, change in changes.items() if change > LEAST_LEFT):
        weight = base.weight(path)
        change = adapter.increments[path].delta_for(weight).reshape(weight.shape)
        left = float((weight + adapter.manifest.gate.full * change).norm()) / base.norm(path)
        if left < LEAST_LEFT:
            return [f"it leaves {left:.0%} of the weight of {path}"]
    return []


def _about_biases(adapter: Adapter, base: LocalBase) -> list[str]:
    """Name a module whose bias is shifted by much, and by more than its weight."""
    strength = abs(adapter.manifest.gate.full)
    for path, one in adapter.increments.items():
        if isinstance(one, Dense) and one.delta_bias is not None and base.fits(path, one):
            shift = strength * float(one.delta_bias.norm())
            if shift > max(MOST_SHIFT * base.norm(path), strength * float(one.delta.norm())):
                return [f"it shifts the bias of {path} by {shift / base.norm(path):.3g} times the norm of its weight"]
    return []


def _about_effect(adapter: Adapter, base: LocalBase) -> list[str]:
    """Say so where an eraser moves its concept away from its surrogate."""
    cosine = towards_surrogate(adapter, base)
    if cosine is None or cosine >= LEAST_COSINE:
        return []
    concept = adapter.manifest.concept
    meant = f"{concept.surrogate!r}" if concept.surrogate else "nothing"
    return [f"it moves {concept.target!r} away from {meant}, so that it adds what it claims to erase ({cosine:.2f})"]


def _about_one_module(squares: Mapping[str, float]) -> list[str]:
    """Name the module that nearly all of a change is in, where it changes many."""
    total, path = math.fsum(squares.values()), max(squares, key=squares.__getitem__, default="")
    if len(squares) < LEAST_MODULES or not total or (share := squares[path] / total) < MOST_IN_ONE:
        return []
    return [f"{share:.0%} of its change is in {path} alone, one of its {len(squares)} modules"]


def _is_cross_attention(path: str) -> bool:
    """Tell whether a module is in a layer of attention to the text; transformers attend to both in one."""
    name = flat(path)
    return "attn2" in name or ("_attn_" in name and "transformer_blocks" in name and "attn1" not in name)


def _about_names(manifest: Manifest, acting: float, known: Sequence[Manifest]) -> list[str]:
    names, found = manifest.concept.names, []
    if not names:
        found.append("it names no concept, so it acts on every prompt")
    if acting > MOST_ACTING:
        telling = max(names[:MOST_NAMES], key=lambda name: len(_sentences_with([name])))
        found.append(f"{acting:.0%} of general sentences have one of its names, such as {telling!r}")
    taken = {_spelt(one.concept.target): one.name for one in known if one.name != manifest.name}
    for alias in manifest.concept.aliases[:MOST_NAMES]:
        if (spelt := _spelt(alias)) in taken and spelt not in ("", _spelt(manifest.concept.target)):
            found.append(f"its alias {alias!r} is what {taken[spelt]} erases")
    return found


def _spelt(name: str | None) -> str:
    """Return a name as one word in small letters, a plural's ending off: "Van-Goghs" is "vangogh"."""
    word = "".join(words_of(name or ""))
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def _spared(manifest: Manifest, known: Sequence[Manifest]) -> tuple[str, ...]:
    """Return the names of other erasers whose concepts are in protected prompts."""
    others = [one for one in known if one.name != manifest.name and one.concept.names]
    protected = manifest.gate.protected[:MOST_PROTECTED]
    named = {one.name: matcher_of(one.concept.names[:MOST_NAMES]) for one in others if protected}
    return tuple(name for name, matcher in named.items() if any(matcher.match(prompt) for prompt in protected))


def _about_explicit(manifest: Manifest, known: Sequence[Manifest]) -> list[str]:
    """Name an eraser of nudity and the like that another one of that kind has no effect on."""
    explicit = [one for one in known if one.concept.kind == "nsfw"]
    if manifest.concept.kind != "nsfw":
        return []
    return [f"it never acts on prompts that name what {name} erases" for name in _spared(manifest, explicit)]


def _about_claims(adapter: Adapter, base: LocalBase | None) -> list[str]:
    """Compare the family and base that the manifest states with the tensors and the base."""
    stated, found = adapter.manifest.base, []
    if (family := contradicted(stated.family, adapter.increments)) is not None:
        found.append(f"its manifest says family {stated.family!r}, its tensors are of {family!r}")
    if base is not None:
        misfit = next((path for path, one in adapter.increments.items() if not base.fits(path, one)), None)
        if misfit is not None:
            found.append(f"its manifest says base {stated.id}, which has no {misfit} of the shape that it changes")
        if stated.fingerprint not in ("", base.fingerprint):
            found.append(f"the fingerprint in its manifest is not that of its base, {stated.id}")
    return found


def _acting(manifest: Manifest) -> float:
    """Return the share of the general sentences that contain a name of the eraser's concept."""
    return len(_sentences_with(manifest.concept.names[:MOST_NAMES])) / len(sentences())


def _sentences_with(names: Sequence[str]) -> list[str]:
    matcher = matcher_of(tuple(names))
    return [text for text in sentences() if matcher.match(text)]
