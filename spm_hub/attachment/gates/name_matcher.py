"""Finds names of concepts in a prompt's text: inflected, joined, split, or misspelt once.

A name counts as found whole, or by those of its words that say which name it is: "gogh" alone means van gogh, and
"van" alone does not.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SHORTEST_MISSPELT = 4
"""Letters of the shortest name that is also found when it is misspelt: of shorter ones too many are other words.

Names of just so many have to begin with the right letter, as people misspell them ("node" may be nude, "rude" is not).
"""

_FILLERS = frozenset("a an the of in on by at to and with style".split())
_LOOKALIKES = str.maketrans("013457@$", "oleastas")
_UNSPACED = r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]"
"""Scripts that put no spaces between words: Thai, Japanese and Chinese."""
_TELLING = (0.6, 0.9)
"""How telling a part of a name is: at most the first counts as nothing, at least the second as the whole name."""


@dataclass(frozen=True)
class Match:
    """A name found in a text: the words that show it, and the share of the name in them, in (0, 1]."""

    share: float
    words: str


class NameMatcher:
    """An index of names; `match` costs the same however many there are."""

    def __init__(self, names: Sequence[str], rarity: Callable[[str], float], is_word: Callable[[str], bool]) -> None:
        """Index the names.

        rarity: of a word, greater for rarer ones, proportional to the inverse of its frequency. is_word: whether a
        word is one that people write on purpose, and hence no misspelling of another.
        """
        self._is_word = is_word
        self._whole: dict[str, list[int]] = defaultdict(list)
        self._deleted: dict[str, set[str]] = defaultdict(set)
        self._parts: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._longest: list[int] = []
        self._unspaced: list[tuple[str, int]] = []
        for index, name in enumerate(names):
            if re.search(_UNSPACED, name):
                self._unspaced.append((name.casefold(), index))
            words = [word for word in words_of(name) if word not in _FILLERS] or words_of(name)
            # A name may be split in two anywhere. No longer run counts, so that a match does not depend on other names.
            self._longest.append(len(words) + 1)
            if not words:
                continue
            for form in _inflections(words):
                self._whole[form].append(index)
                if len(form) >= _SHORTEST_MISSPELT:
                    for shorter in {form, *_deletions(form)}:
                        self._deleted[shorter].add(form)
            if len(words) > 1:
                rarest = max(map(rarity, words))
                for word in words:
                    telling = min(1.0, max(0.0, (rarity(word) / rarest - _TELLING[0]) / (_TELLING[1] - _TELLING[0])))
                    if telling > 0:
                        for form in _inflections([word]):
                            self._parts[form].append((index, telling))

    def match(self, text: str) -> dict[int, Match]:
        """Return the names in a text, by their index, each with the words that show it best."""
        found = {index: Match(1.0, name) for name, index in self._unspaced if name in text.casefold()}
        words = words_of(text)
        for span in self._spans(words):
            shown = " ".join(span)
            for form in _inflections(span):
                for index in self._whole.get(form, ()):
                    if len(span) <= self._longest[index]:
                        found[index] = Match(1.0, shown)
                if len(span) == 1:
                    for index, share in self._parts.get(form, ()):
                        if index not in found or found[index].share < share:
                            found[index] = Match(share, shown)
            for index in self._misspelt(span):
                found.setdefault(index, Match(1.0, shown))
                if found[index].share < 1:
                    found[index] = Match(1.0, shown)
        return found

    def _spans(self, words: Sequence[str]) -> list[list[str]]:
        """Return all runs of words that could be a name, and runs of single letters as one word each."""
        longest = max(self._longest, default=1)
        spans = [
            list(words[start:end])
            for start in range(len(words))
            for end in range(start + 1, min(len(words), start + longest) + 1)
        ]
        run: list[str] = []
        for word in [*words, ""]:
            if len(word) == 1:
                run.append(word)
                continue
            if len(run) > 2:
                spans.append(["".join(run)])
            run = []
        return spans

    def _misspelt(self, span: Sequence[str]) -> list[int]:
        found: list[int] = []
        for joined in _inflections(span):
            if len(joined) < _SHORTEST_MISSPELT - 1 or self._is_word(joined) or all(map(self._is_word, span)):
                continue
            near = {form for shorter in (joined, *_deletions(joined)) for form in self._deleted.get(shorter, ())}
            near = {form for form in near if len(form) > _SHORTEST_MISSPELT or joined[0] == form[0]}
            found += [index for form in near if _one_edit_apart(joined, form) for index in self._whole[form]]
        return [index for index in found if len(span) <= self._longest[index]]


def words_of(text: str) -> list[str]:
    """Return the words of a text in small letters without accents.

    Digits and signs that replace letters are read as these letters.
    """
    plain = unicodedata.normalize("NFKD", text).casefold()
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    words = re.findall(
        r"[^\W_]+(?:['’][^\W_]+)*", re.sub(r"(?<=\w)[@$](?=\w)", lambda at: "a" if at[0] == "@" else "s", plain)
    )
    return [word.translate(_LOOKALIKES) if re.search(r"[a-z]", word) else word for word in words]


def _inflections(words: Sequence[str]) -> set[str]:
    """Return the joined words with every ending of a plural or a possessive taken off the last one."""
    head, last = "".join(words[:-1]).replace("'", "").replace("’", ""), words[-1]
    stem = re.sub(r"['’]s?$", "", last)
    forms = {last.replace("'", "").replace("’", ""), stem}
    for form in tuple(forms):
        if len(form) > 3 and form.endswith("s"):
            forms.add(form[:-1])
            if form.endswith("es"):
                forms.add(form[:-2])
            if form.endswith("ies"):
                forms.add(form[:-3] + "y")
    return {head + form for form in forms}


def _deletions(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at in range(len(word))]


def _one_edit_apart(one: str, other: str) -> bool:
    """Return whether a single misspelling makes one word the other.

    That is: a letter added, dropped or replaced, or two neighbours swapped.
    """
    if abs(len(one) - len(other)) > 1 or one == other:
        return False
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    if len(a) == len(b):
        return a[1:] == b[1:] or (a[:2] == b[:2][::-1] and a[2:] == b[2:])
    return a[1:] == b if len(a) > len(b) else a == b[1:]
