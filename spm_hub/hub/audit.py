"""Audits erasers of strangers: looks in their tensors and names for harm that they do not admit.

An audit compares the eraser's claims with its tensors, its change with the weights that it is added to and with the
changes of other erasers, and its names and protected prompts with general sentences. It finds no trigger that is in
none of these sentences, and no small change that was trained to do harm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.checkpoint_folder import FolderWeights
from spm_hub.adapters.formats.module_names import dotted, family_of, flat
from spm_hub.adapters.manifest import Manifest
from spm_hub.adapters.overlap import inner_products, undoings
from spm_hub.attachment.gates.bank import sentences
from spm_hub.attachment.gates.name_matcher import NameMatcher, words_of
from spm_hub.errors import SpmHubError
from spm_hub.io.untrusted_text import one_line
from spm_hub.models.aliases import ALIASES
from spm_hub.models.architectures import fingerprint
from spm_hub.models.references import local_folder, parse_reference

MOST_STRENGTH = 4.0
"""Greatest strength that nothing is said about; the strengths of published erasers are near 1."""
MOST_CHANGE = 0.9
"""Greatest change of a weight, as a share of its own norm, that nothing is said about."""
MOST_ACTING = 0.02
"""Greatest share of the general sentences with a name of the eraser that nothing is said about."""
MOST_NAMES, MOST_PROTECTED = 64, 256

_LEAST_LETTERS = 3
_SIGN = re.compile(r"<\|.*?\|>|</?s>|<(pad|unk|mask|bos|eos)>|\[(PAD|UNK|CLS|SEP|MASK)\]|</w>|\u2581|<extra_id_\d+>")
_STOP_WORDS = frozenset(
    "a about above after all also an and any are around as at be before behind below between both but by can each for "
    "from had has have he her his how in into is it its just more most my near no not of off on one only or other our "
    "out over own she so some such than that the their them then there these they this those through to too two under "
    "up very was we were what when where which who with you your".split()
)


@dataclass(frozen=True)
class Findings:
    """The audit of one eraser.

    problems: what a user should know before using it, in words; empty if there is nothing to say. undoes: the names of
    other erasers whose change it takes back. greatest_change: of a weight, as a share of that weight's norm, and the
    module it is in; None without a base. norm: of the whole change, at its strength. outside: the share of the squared
    norm outside cross-attention, for information. acting: the share of the general sentences with one of its names.
    """

    name: str
    problems: tuple[str, ...]
    undoes: tuple[str, ...]
    norm: float
    outside: float
    acting: float
    greatest_change: tuple[float, str] | None = None


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
    strengths = [adapter.manifest.gate.strength for adapter in together]
    undone = undoings(inner_products([adapter.increments for adapter in together]), strengths)
    known = [*(adapter.manifest for adapter in together), *others]
    found = []
    for index, adapter in enumerate(adapters):
        undoes = [(together[one.of].name, one.cosine) for one in undone if one.by == index]
        folder = _denoiser_folder(model or _public(adapter.manifest.base.id))
        change = None if folder is None else _greatest_change(adapter, FolderWeights(folder))
        acting = _acting(adapter.manifest)
        problems = [
            *beyond_limits(adapter.manifest),
            *_about_change(change),
            *(f"its change and that of {name} undo each other (cosine {cosine:.2f})" for name, cosine in undoes),
            *_about_names(adapter.manifest, acting, known),
            *_about_claims(adapter),
        ]
        squares = _squared_norms(adapter)
        total = math.fsum(squares.values())
        inside = math.fsum(square for path, square in squares.items() if _is_cross_attention(path))
        norm, outside = abs(adapter.manifest.gate.strength) * math.sqrt(total), 1 - inside / total if total else 0.0
        others_undone = tuple(name for name, _ in undoes)
        found.append(Findings(adapter.name, tuple(problems), others_undone, norm, outside, acting, change))
    return found


def beyond_limits(manifest: Manifest) -> tuple[str, ...]:
    """Return in words where a stranger's manifest asks for more than an honest eraser needs.

    The limits: a strength from 0 to 4; at most 64 names, each of three letters or more that are all seen, and more than
    stop words and a tokenizer's own signs; at most 256 protected prompts, none of which names the concept. Reads no
    tensor.
    """
    names, protected = manifest.concept.names, manifest.gate.protected
    found = _about_strength(manifest)
    if len(names) > MOST_NAMES:
        found.append(f"it has {len(names)} names; {MOST_NAMES} are allowed")
    if len(protected) > MOST_PROTECTED:
        found.append(f"it never acts on {len(protected)} prompts; {MOST_PROTECTED} are allowed")
    for name in names[:MOST_NAMES]:
        if (reason := _objection(name)) is not None:
            found.append(f"its name {one_line(name[:40])!r} {reason}")
            break
    matcher = _matcher(names[:MOST_NAMES])
    own = next((prompt for prompt in protected[:MOST_PROTECTED] if matcher.match(prompt)), None)
    if own is not None:
        found.append(f"it never acts on {one_line(own[:40])!r}, which names its own concept")
    return tuple(found)


def _objection(name: str) -> str | None:
    """Return the reason why a gate should not look for a name, None if there is none."""
    if one_line(name) != name:
        return "has characters that are not seen"
    if _SIGN.search(name):
        return "is a tokenizer's own sign"
    letters = [letter for letter in name if letter.isalpha()]
    # A Chinese, Japanese or Korean letter is as much as a syllable or a word.
    if len(letters) < _LEAST_LETTERS and not any(letter >= "\u3040" for letter in letters):
        return f"has fewer than {_LEAST_LETTERS} letters"
    if all(word in _STOP_WORDS for word in words_of(name)):
        return "is in every other sentence"
    return None


def _public(base: str) -> str:
    """Return a base's id if it is an alias or of the form owner/name, else nothing.

    A stranger must not name a folder to read.
    """
    return base if base in ALIASES or re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""


def _denoiser_folder(model: str) -> Path | None:
    """Return the folder of a model's denoiser; None where there is none on this machine."""
    try:
        folder = local_folder(parse_reference(model)) if model else None
    except SpmHubError:
        return None
    parts = () if folder is None else (folder / "unet", folder / "transformer")
    return next((part for part in parts if part.is_dir()), None)


def _greatest_change(adapter: Adapter, base: FolderWeights) -> tuple[float, str]:
    """Return the greatest change of a weight, as a share of its norm, and its module."""
    strength, greatest = abs(adapter.manifest.gate.strength), (0.0, "")
    keys = {path: f"{dotted(path)}.weight" for path in adapter.increments}
    for path, increment in adapter.increments.items():
        if keys[path] not in base:
            continue
        (weight,) = base.read([keys[path]]).values()
        if increment.weight_shape and math.prod(increment.weight_shape) != weight.numel():
            continue
        change = (
            strength * float(increment.delta_for(weight).double().norm()) / max(float(weight.double().norm()), 1e-30)
        )
        greatest = max(greatest, (change, path))
    return greatest


def _squared_norms(adapter: Adapter) -> dict[str, float]:
    return {path: float(inner_products([{path: increment}])[0, 0]) for path, increment in adapter.increments.items()}


def _is_cross_attention(path: str) -> bool:
    """Tell whether a module is in a layer of attention to the text; transformers attend to both in one."""
    name = flat(path)
    return "attn2" in name or ("_attn_" in name and "transformer_blocks" in name and "attn1" not in name)


def _about_strength(manifest: Manifest) -> list[str]:
    strength = manifest.gate.strength
    if strength < 0:
        return [f"its strength is {strength:g}: it adds what it claims to erase"]
    if strength > MOST_STRENGTH:
        return [f"its strength is {strength:g}; nothing above {MOST_STRENGTH:g} is usual"]
    return []


def _about_change(change: tuple[float, str] | None) -> list[str]:
    if change is None or change[0] <= MOST_CHANGE:
        return []
    return [f"it changes {change[1]} by {change[0]:.3g} times that weight's own norm"]


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


def _about_claims(adapter: Adapter) -> list[str]:
    """Compare the family and the fingerprint of the manifest with the tensors."""
    base, found = adapter.manifest.base, []
    family = family_of(adapter.increments)
    if family is not None and family != base.family:
        found.append(f"its manifest says family {base.family!r}, its tensors are of {family!r}")
    shapes = {path: increment.weight_shape for path, increment in adapter.increments.items()}
    if base.fingerprint and all(shape is not None for shape in shapes.values()):
        actual = fingerprint({path: shape for path, shape in shapes.items() if shape is not None})
        if actual != base.fingerprint:
            found.append("the fingerprint in its manifest is not that of its tensors")
    return found


def _acting(manifest: Manifest) -> float:
    """Return the share of the general sentences that contain a name of the eraser's concept."""
    return len(_sentences_with(manifest.concept.names[:MOST_NAMES])) / len(sentences())


def _sentences_with(names: Sequence[str]) -> list[str]:
    matcher = _matcher(tuple(names))
    return [text for text in sentences() if matcher.match(text)]


@lru_cache(maxsize=128)
def _matcher(names: tuple[str, ...]) -> NameMatcher:
    """Return a matcher that takes no word for a misspelling of another."""
    return NameMatcher(names, lambda word: 1.0, lambda word: True)
