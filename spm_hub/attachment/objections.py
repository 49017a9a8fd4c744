"""Objects to erasers that are about to act: to excessive claims, and to undoing another one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import nn

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.formats.lazy import StoredIncrements
from spm_hub.adapters.formats.module_names import flat
from spm_hub.adapters.manifest import Manifest, excess_of
from spm_hub.adapters.overlap import products_and_opposed, squared_norms, undoings
from spm_hub.attachment.gates.everyday_prompts import share_of_prompts
from spm_hub.attachment.gates.name_matcher import NameMatcher, words_of
from spm_hub.attachment.options import Eraser
from spm_hub.errors import UsageError
from spm_hub.io.untrusted_text import one_line
from spm_hub.models.architectures import weight_of

MOST_CHANGE, MOST_CHANGE_OF_TEXT = 0.9, 40.0
"""Greatest changes of a weight, as a share of its own norm, that nothing is said about. The second is for layers that
read the text: closed forms change these along few directions, in which general sentences have no part."""
_READS_TEXT = re.compile(r"(attn2_to_[kv]|add_[kv]_proj|context_embedder|caption_projection\w*)$")
MOST_NAMES, MOST_PROTECTED = 64, 256
MOST_EVERYDAY = 0.03
"""Greatest share of everyday prompts with an alias that nothing is said about. The target, which users see, may have
more: an eraser of people acts on many prompts."""
_PEOPLE = frozenset("person people human man men woman women girl boy child children kid baby lady guy face".split())
"""Names of each other: an eraser of a person may have all of them as aliases."""

_LEAST_LETTERS = 3
_SIGN = re.compile(r"<\|.*?\|>|</?s>|<(pad|unk|mask|bos|eos)>|\[(PAD|UNK|CLS|SEP|MASK)\]|</w>|\u2581|<extra_id_\d+>")
_STOP_WORDS = frozenset(
    "a about above after all also an and any are around as at be before behind below between both but by can each for "
    "from had has have he her his how in into is it its just more most my near no not of off on one only or other our "
    "out over own she so some such than that the their them then there these they this those through to too two under "
    "up very was we were what when where which who with you your".split()
)
_SAMPLED = 4096
"""Elements of a weight from which its norm is estimated, within some per cent."""


class Objections:
    """The checks of erasers before they act on one denoiser: warnings and refusals.

    Lazily loaded erasers are not compared with others, as their numbers are read when a prompt needs them.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        """warn: called with each message that is no refusal."""
        self._warn = warn
        self._acting: dict[str, Eraser] = {}
        self._squares: dict[str, dict[str, float]] = {}
        self._norms: dict[str, float] = {}

    def admit(self, erasers: Sequence[Eraser], *, force: bool) -> None:
        """Check erasers together with those that were admitted before, and remember them.

        Raises UsageError, with the names of both, where an eraser takes back the change of another; with `force` that
        is a warning. Warns of manifests beyond the limits of strangers, and of changes that are large for their weight.
        """
        compared: list[Eraser] = []
        squares: dict[str, dict[str, float]] = {}
        for eraser in erasers:
            manifest = eraser.adapter.manifest
            if eraser.strength != manifest.gate.strength:  # the user has chosen another
                gate = manifest.gate.model_copy(update={"strength": 1.0})
                manifest = manifest.model_copy(update={"gate": gate})
            for said in beyond_limits(manifest):
                self._warn(f"{eraser.adapter.name}: {said}")
            if not isinstance(eraser.adapter.increments, StoredIncrements):
                compared.append(eraser)
                norms = squared_norms(eraser.increments)
                squares[eraser.adapter.name] = norms
                if (excess := about_changes(self._changes(eraser, norms))) is not None:
                    self._warn(f"{eraser.adapter.name}: {excess}")
        for undone in self._undone(compared, squares):
            if not force:
                raise UsageError(
                    f"{undone}; nothing was attached",
                    mend="attach only one of them; if it is meant: force=True, or the same command with --force",
                )
            self._warn(undone)
        self._acting |= {eraser.adapter.name: eraser for eraser in compared}
        self._squares |= squares

    def forget(self, adapter: Adapter) -> None:
        """Forget an eraser that acts no longer."""
        self._acting.pop(adapter.name, None)
        self._squares.pop(adapter.name, None)

    def _undone(self, new: Sequence[Eraser], squares: dict[str, dict[str, float]]) -> Iterator[str]:
        """Name each new eraser that takes back the change of another, or the other way round."""
        before = list(self._acting.values())
        together = [*new, *before]
        if not new or len(together) < 2:
            return
        known = [(self._squares | squares)[one.adapter.name] for one in together]
        products = torch.tensor([math.fsum(norms.values()) for norms in known], dtype=torch.float64).diag()
        found, against = products_and_opposed([one.increments for one in new], [one.increments for one in together])
        products[: len(new)], products[:, : len(new)] = found, found.T
        opposed = torch.zeros_like(products)
        opposed[: len(new)], opposed[:, : len(new)] = against, against.T
        names = [eraser.adapter.name for eraser in together]
        for one in undoings(products, [eraser.factor() for eraser in together], known, opposed):
            yield one.describe(names)

    def _changes(self, eraser: Eraser, squares: Mapping[str, float]) -> dict[str, float]:
        """Return about how much an eraser changes its modules' weights, as shares of their norms, where known."""
        changes = {}
        for path, square in squares.items():
            if path not in self._norms:
                self._norms[path] = _norm(eraser.modules[path])
            if self._norms[path]:
                changes[path] = abs(eraser.factor()) * math.sqrt(max(square, 0.0)) / self._norms[path]
        return changes


def about_changes(changes: Mapping[str, float]) -> str | None:
    """Say which module's weight is changed beyond the limits; None if none is.

    changes: of each module's weight, as a share of its norm.
    """
    excess = {
        path: change / (MOST_CHANGE_OF_TEXT if _READS_TEXT.search(flat(path)) else MOST_CHANGE)
        for path, change in changes.items()
    }
    worst = max(excess, key=excess.__getitem__, default="")
    if excess.get(worst, 0.0) <= 1:
        return None
    return f"it changes {worst} by {changes[worst]:.3g} times that weight's own norm"


def _norm(module: nn.Module) -> float:
    """Estimate the norm of a weight from some of its elements; 0 where it is not plain numbers in memory."""
    weight = weight_of(module)
    if weight.is_meta or type(weight) is not nn.Parameter or not weight.is_floating_point():
        return 0.0
    numbers = weight.detach().flatten()
    some = numbers[:: max(1, numbers.numel() // _SAMPLED)]
    return math.sqrt(float(some.float().square().mean()) * numbers.numel())


def beyond_limits(manifest: Manifest) -> tuple[str, ...]:
    """Return in words where a stranger's manifest asks for more than an honest eraser needs.

    The limits: a strength from 0 to 4; at most 64 names, each of three letters or more that are all seen, and more than
    stop words and a tokenizer's own signs; aliases that are not in everyday prompts; at most 256 protected prompts,
    none of which names the concept. Reads no tensor.
    """
    names, protected = manifest.concept.names, manifest.gate.protected
    found = [said for said in (excess_of(manifest.gate.full),) if said is not None]
    if len(names) > MOST_NAMES:
        found.append(f"it has {len(names)} names; {MOST_NAMES} are allowed")
    if len(protected) > MOST_PROTECTED:
        found.append(f"it never acts on {len(protected)} prompts; {MOST_PROTECTED} are allowed")
    for name in names[:MOST_NAMES]:
        if (reason := _objection(name)) is not None:
            found.append(f"its name {one_line(name[:40])!r} {reason}")
            break
    if (said := _about_aliases(manifest)) is not None:
        found.append(said)
    matcher = matcher_of(names[:MOST_NAMES])
    own = next((prompt for prompt in protected[:MOST_PROTECTED] if matcher.match(prompt)), None)
    if own is not None:
        found.append(f"it never acts on {one_line(own[:40])!r}, which names its own concept")
    return tuple(found)


def _about_aliases(manifest: Manifest) -> str | None:
    """Say so if aliases let an eraser act on prompts that people write every day, and its target does not."""
    target, aliases = manifest.concept.target, manifest.concept.aliases[:MOST_NAMES]
    if target is None or not aliases:
        return None
    aliases = tuple(alias for alias in aliases if _objection(alias) is None)
    if not _PEOPLE.isdisjoint(words_of(target)):
        aliases = tuple(alias for alias in aliases if _PEOPLE.isdisjoint(words_of(alias)))
    beyond = share_of_prompts([target, *aliases]) - share_of_prompts([target])
    if beyond <= MOST_EVERYDAY:
        return None
    telling = max(aliases, key=lambda alias: share_of_prompts([alias]))
    shown = one_line(telling[:40])
    return f"{beyond:.0%} of everyday prompts have one of its aliases, such as {shown!r}, and not its target"


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


@lru_cache(maxsize=128)
def matcher_of(names: tuple[str, ...]) -> NameMatcher:
    """Return a matcher that takes no word for a misspelling of another."""
    return NameMatcher(names, lambda word: 1.0, lambda word: True)
