"""Audits erasers of strangers: looks in their tensors and names for harm that they do not admit.

An audit compares the eraser's claims with its tensors, its change with the weights that it is added to and with the
changes of other erasers, and its names and protected prompts with general sentences. It finds no trigger that is in
none of these sentences, and no small change that was trained to do harm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.checkpoint_folder import FolderWeights
from spm_hub.adapters.formats.module_names import contradicted, dotted, flat
from spm_hub.adapters.increments import Increment
from spm_hub.adapters.manifest import Manifest
from spm_hub.adapters.overlap import inner_products, squared_norms, undoings
from spm_hub.attachment.gates.bank import sentences
from spm_hub.attachment.objections import (
    MOST_NAMES,
    MOST_PROTECTED,
    about_changes,
    beyond_limits,
    matcher_of,
)
from spm_hub.errors import SpmHubError
from spm_hub.models.aliases import ALIASES
from spm_hub.models.architectures import fingerprint_by_names
from spm_hub.models.references import local_folder, parse_reference

MOST_ACTING = 0.02
"""Greatest share of the general sentences with a name of the eraser that nothing is said about."""

LEAST_LEFT = 0.5
"""Share of a weight, in its norm, that an honest eraser leaves."""


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
    others: Sequence[Manifest] = (),
) -> list[Findings]:
    """Audit erasers, each of them also against all the others.

    beside: further erasers to compare these with, which are not audited themselves.
    model: the base whose weights the changes are compared with; None is the one that each was trained on. A base that
    is not on this machine is left out. others: manifests of further erasers whose concepts the names are compared with.
    Reads all tensors of the erasers. Raises AdapterFileError for a file that is damaged.
    """
    together = [*adapters, *beside]
    strengths = [adapter.manifest.gate.full for adapter in together]
    norms = [squared_norms(adapter.increments) for adapter in together]
    undone = undoings(inner_products([adapter.increments for adapter in together]), strengths, norms)
    known = [*(adapter.manifest for adapter in together), *others]
    base_of = cache(_base)
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


def _base(model: str) -> _Base | None:
    """Return the denoiser of a model; None where there is none on this machine."""
    try:
        folder = local_folder(parse_reference(model)) if model else None
    except SpmHubError:
        return None
    parts = () if folder is None else (folder / "unet", folder / "transformer")
    return next((_Base(part) for part in parts if part.is_dir()), None)


class _Base:
    """The denoiser of a base on this machine: its shapes, norms and fingerprint."""

    def __init__(self, folder: Path) -> None:
        self._weights = FolderWeights(folder)
        self.shapes = self._weights.shapes()
        self._norms: dict[str, float] = {}

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint_by_names(self.shapes)

    def fits(self, path: str, increment: Increment) -> bool:
        """Return whether there is a weight of this path, with as many elements as the increment's."""
        there, shape = self.shapes.get(f"{dotted(path)}.weight"), increment.weight_shape
        return there is not None and (shape is None or math.prod(shape) == math.prod(there))

    def weight(self, path: str) -> Tensor:
        """Read the weight of a module, as float32."""
        (weight,) = self._weights.read([f"{dotted(path)}.weight"]).values()
        return weight.float()

    def norm(self, path: str) -> float:
        """Return the norm of a module's weight, never 0."""
        if path not in self._norms:
            self._norms[path] = max(float(self.weight(path).norm()), 1e-30)
        return self._norms[path]


def _changes(adapter: Adapter, squares: Mapping[str, float], base: _Base) -> dict[str, float]:
    """Return how much an eraser changes the weights of its modules, as shares of their norms."""
    strength = abs(adapter.manifest.gate.full)
    return {
        path: strength * math.sqrt(max(square, 0.0)) / base.norm(path)
        for path, square in squares.items()
        if square and base.fits(path, adapter.increments[path])
    }


def _about_removal(adapter: Adapter, changes: Mapping[str, float], base: _Base) -> list[str]:
    """Name a module that an eraser leaves less than half of its weight, in the norm."""
    for path in (path for path, change in changes.items() if change > LEAST_LEFT):
        weight = base.weight(path)
        change = adapter.increments[path].delta_for(weight).reshape(weight.shape)
        left = float((weight + adapter.manifest.gate.full * change).norm()) / base.norm(path)
        if left < LEAST_LEFT:
            return [f"it leaves {left:.0%} of the weight of {path}"]
    return []


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
    taken = {
        one.concept.target.casefold(): one.name for one in known if one.concept.target and one.name != manifest.name
    }
    for alias in manifest.concept.aliases:
        if alias.casefold() in taken and alias.casefold() != str(manifest.concept.target).casefold():
            found.append(f"its alias {alias!r} is what {taken[alias.casefold()]} erases")
    return found


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


def _about_claims(adapter: Adapter, base: _Base | None) -> list[str]:
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
