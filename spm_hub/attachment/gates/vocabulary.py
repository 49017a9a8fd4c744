"""Words of a tokenizer: how rare they are, and sentences made of them.

General English sentences are mostly fragments of words to the text encoder of a small or special model. Sentences made
of the tokenizer's own words show what such an encoder distinguishes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

_LEAST_LETTERS = 3
_SINGLE = ("{}", "a photo of a {}")
_FRAMES = (
    "a big {0}", "my {0} at night", "{0} and {1}", "{0} {1}", "the {0} with a {1}", "{0}, {1}, {2}",
    "{0} {1} {2} {3}", "a {0} {1} in {2}", "picture of {0} {1}, {2}", "{0} by {1}", "{0} {1} {2} {3} {4} {5}",
)  # fmt: skip
_WORDS = 6
"""Words that a frame has room for."""


def whole_words(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of tokens that are whole words: CLIP's `word</w>`, T5's `▁word`, Qwen's `Ġword`."""
    found: dict[str, int] = {}
    for token, index in vocabulary.items():
        word = token.removesuffix("</w>") if token.endswith("</w>") else token[1:] if token[:1] in "▁Ġ" else ""
        if word.isalpha():
            folded = word.casefold()
            found[folded] = min(index, found.get(folded, index))
    return found


def rarity_of(words: Mapping[str, int], rarest: int) -> Callable[[str], float]:
    """Return how rare words are by the ids of a tokenizer's whole words: frequent ones have small ids.

    A word that is no token of its own is as rare as the token with the id `rarest`.
    """
    return lambda word: float(words.get(word, rarest))


def words_for_sentences(vocabulary: Mapping[str, int]) -> list[str]:
    """Return the whole words of a tokenizer that sentences are made of, in alphabetical order."""
    return sorted(word for word in whole_words(vocabulary) if len(word) >= _LEAST_LETTERS)


def single_words(words: Sequence[str], count: int) -> tuple[str, ...]:
    """Return at most `count` sentences with one word each, of words spread evenly over the list."""
    places = count // len(_SINGLE)
    chosen = words if len(words) <= places else [words[index * len(words) // places] for index in range(places)]
    return tuple(frame.format(word) for word in chosen for frame in _SINGLE)


def sentences_of(words: Sequence[str], count: int) -> tuple[str, ...]:
    """Return `count` sentences of several words each, the same ones for equal words.

    There are fewer sentences where the words do not suffice, none for fewer than six words.
    """
    if len(words) < _WORDS:
        return ()
    dice, found = random.Random(0), dict[str, None]()
    for _ in range(2 * count):
        found[dice.choice(_FRAMES).format(*dice.sample(words, _WORDS))] = None
    return tuple(found)[:count]
