"""Prompts for training: the concept in many sentences, and the many things that must stay.

Targets and anchors fill the SAME sentences, so that what differs between "a photo of snoopy on the beach" and "a photo
of a cat on the beach" is the concept and nothing else: the eraser then learns the concept, not the sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Protocol

import torch
import yaml

_HEADS: tuple[str, ...] = (
    "{}", "{}", "a photo of {}", "a picture of {}", "a drawing of {}", "a painting of {}", "an image of {}",
    "a cartoon of {}", "a small {}", "a big {}", "two {}", "the {}", "{word} {}",
)  # fmt: skip
# Text encoders that read from left to right carry the concept on into every later word, and it has to go from there
# too. They may contain any word of the base's: otherwise the concept comes back next to words that anchors keep.
_TAILS: tuple[str, ...] = (
    "", "", "{scene}", "{scene}", "by {artist}", "{scene} by {artist}", "and {thing}", "{word}", "in the {word}",
    "{where} the {word}", "{where} the {word}",
)  # fmt: skip
_WHERE: tuple[str, ...] = ("in", "on", "at", "under", "by", "near", "with", "over")
SUBJECT_FRAMES: tuple[str, ...] = tuple(f"{head} {tail}".strip() for head in _HEADS for tail in _TAILS)
STYLE_FRAMES: tuple[str, ...] = (
    "{}", "by {}", "a painting by {}", "{thing} by {}", "{thing} by {}", "a painting of {thing} by {}",
    "{thing} {scene} by {}", "{thing} by {} {scene}", "{thing} by {} {where} the {word}", "{thing} in the style of {}",
    "{thing}, {} style", "a {} painting of {thing}", "art by {}",
)  # fmt: skip


SMALL_VOCABULARY = 2000
"""Up to so many words a tokenizer's own words are names too; of CLIP's ten thousands most name nothing."""


class Tokenizer(Protocol):
    """A tokenizer with a vocabulary."""

    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Words:
    """General words by part (see words.yaml)."""

    things: tuple[str, ...]
    people: tuple[str, ...]
    characters: tuple[str, ...]
    artists: tuple[str, ...]
    scenes: tuple[str, ...]

    @classmethod
    def load(cls) -> Words:
        text = resources.files(__package__).joinpath("words.yaml").read_text(encoding="utf-8")
        parts = yaml.safe_load(text).items()
        return cls(**{part: tuple(" ".join(word.split()) for word in words.split(",")) for part, words in parts})


def vocabulary_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the whole alphabetic words that a tokenizer knows, by their ids.

    They are CLIP's `word</w>`, T5's `▁word` and Qwen's `Ġword`. A base model's own words are the best guess at the
    things that it can draw. CLIP marks the end of a word and not its beginning: the ending of another word may be a
    mere piece of it (`achute` of `parachute`), which means nothing, and is left out.
    """
    found = []
    endings: set[str] = set()
    for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        match = re.fullmatch(r"([a-z]{3,})</w>|[▁Ġ]([a-z]{3,})", token)
        if match:
            found.append(match.group(1) or match.group(2))
        if match and match.group(1):
            endings.update(match.group(1)[start:] for start in range(1, len(match.group(1))))
    return tuple(word for word in dict.fromkeys(found) if word not in endings)


def _pick(options: Sequence[str], generator: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=generator))]


@dataclass(frozen=True)
class PromptMaker:
    """Draws target and anchor prompts for one concept.

    names: the concept's target and aliases; kind: decides whether its sentences are a subject's or a style's
    ("other" uses both); vocabulary: further words of the base model.
    """

    names: tuple[str, ...]
    kind: str
    words: Words
    vocabulary: tuple[str, ...]

    def _frames(self) -> tuple[str, ...]:
        if self.kind == "style":
            return STYLE_FRAMES
        return SUBJECT_FRAMES if self.kind != "other" else SUBJECT_FRAMES + STYLE_FRAMES

    def _fill(self, frame: str, name: str, generator: torch.Generator) -> str:
        return frame.format(
            name,
            where=_pick(_WHERE, generator),
            scene=_pick(self.words.scenes, generator),
            artist=self._other(self.words.artists, generator),
            thing=self._other(self.words.things + self.words.people, generator),
            word=self._other(self.vocabulary or self.words.things, generator),
        )

    def mentions_concept(self, text: str) -> bool:
        """Return whether `text` has any name of the concept, or half of the words of one."""
        words = set(re.findall(r"\w+", text.lower()))
        for name in self.names:
            own = set(re.findall(r"\w+", name.lower())) - {"a", "an", "the", "of"}
            if (own and len(own & words) >= len(own) / 2) or (not own and name.lower() in text.lower()):
                return True
        return False

    def _other(self, options: Sequence[str], generator: torch.Generator) -> str:
        for _ in range(64):
            word = _pick(options, generator)
            if not self.mentions_concept(word):
                return word
        return ""

    def target(self, generator: torch.Generator) -> str:
        """A sentence about the concept; its bare first name half of the time, as users write it."""
        name = self.names[0] if float(torch.rand((), generator=generator)) < 0.6 else _pick(self.names, generator)
        if float(torch.rand((), generator=generator)) < 0.25:
            return name
        return self._fill(_pick(self._frames(), generator), name, generator)

    def without(self, sentence: str, surrogate: str) -> str:
        """The sentence with `surrogate`, or nothing, in the place of the concept's names.

        A style goes together with its "by", and its name alone becomes the surrogate: "a dog by van gogh" is a dog.
        """
        names = "|".join(re.escape(name) for name in sorted(self.names, key=len, reverse=True))
        concept = rf"(?<!\w)({names})(?!\w)"  # \b would ask for a letter at the end of "yahoo!"
        if self.kind == "style":
            concept = rf"(,|\bin the style of|\bby)?\s*{concept}(\s+style\b)?"
        put = "" if self.kind == "style" else surrogate
        found = " ".join(re.sub(concept, lambda name: put, sentence, flags=re.IGNORECASE).split())
        return found or surrogate

    def anchor(self, generator: torch.Generator) -> str:
        """A sentence that does not mention the concept."""
        chance = float(torch.rand((), generator=generator))
        if chance < 0.4 and self.vocabulary:
            name = self._other(self.vocabulary, generator)
        elif chance < 0.7:
            name = self._other(self.words.things, generator)
        elif chance < 0.8:
            name = self._other(self.words.people, generator)
        elif chance < 0.88:
            name = self._other(self.words.characters, generator)
        else:
            artist = self._other(self.words.artists, generator)
            return self._fill(_pick(STYLE_FRAMES, generator), artist, generator)
        bare = float(torch.rand((), generator=generator)) < 0.25
        text = name if bare else self._fill(_pick(SUBJECT_FRAMES, generator), name, generator)
        return text if not self.mentions_concept(text) else name
