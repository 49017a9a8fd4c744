"""Prompts as people write them, in which the names of an honest eraser are rare.

The general sentences of a calibrated gate have every noun about equally often. In these, words are about as frequent
as in prompts that are typed: one in five is about a man, a woman or a child.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources

from spm_hub.attachment.gates.name_matcher import words_of

_LONGEST = 5
_ARTICLES = frozenset({"a", "an", "the"})


def share_of_prompts(names: Sequence[str]) -> float:
    """Return the share of the prompts that contain one of these names as a whole, in singular or plural."""
    by_phrase = _by_phrase()
    return len(frozenset().union(*(by_phrase.get(_phrase(words_of(name)), ()) for name in names))) / len(prompts())


@cache
def prompts() -> tuple[str, ...]:
    """Return the prompts, which were written for this package."""
    text = resources.files(__package__).joinpath("everyday_prompts.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


@cache
def _by_phrase() -> dict[str, frozenset[int]]:
    """Return the places of the prompts that contain each phrase of at most `_LONGEST` words."""
    found: dict[str, set[int]] = defaultdict(set)
    for place, prompt in enumerate(prompts()):
        for phrase in _phrases(words_of(prompt)):
            found[phrase].add(place)
    return {phrase: frozenset(places) for phrase, places in found.items()}


def _phrases(words: Sequence[str]) -> Iterator[str]:
    for start in range(len(words)):
        for end in range(start + 1, min(len(words), start + _LONGEST) + 1):
            yield _phrase(words[start:end])


def _phrase(words: Sequence[str]) -> str:
    """Join words without articles in front, the last one without the ending of a plural."""
    first = next((place for place, word in enumerate(words) if word not in _ARTICLES), 0)
    kept = list(words[first:])
    if kept and len(kept[-1]) > 3 and kept[-1].endswith("s") and not kept[-1].endswith("ss"):
        kept[-1] = kept[-1][:-1]
    return " ".join(kept)
