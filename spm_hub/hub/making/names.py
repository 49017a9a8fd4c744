"""Chooses the names that a quick look draws: those nearest to a concept, and some others.

A small tokenizer knows few words, and its base draws no other names. Every name of a large one's counts as known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Generator

_SHARE = 1 / 4
"""If names of things are a smaller share of a small tokenizer's words, the other words name things too."""


def nearest(pipe: DiffusionPipeline, names: Sequence[str], kind: str, count: int) -> list[str]:
    """Return `count` names of a concept's kind, those that the text encoder puts nearest to it.

    names: of the concept, its target first.
    """
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.nearest import nearest_names
    from spm_hub.training.data.prompts import Words

    words = Words.load()
    of_kind = {
        "style": words.artists, "person": (*words.people, *words.characters), "nsfw": words.people
    }.get(kind)  # fmt: skip
    options = (*words.things, *words.characters) if of_kind is None else of_kind
    known = _known(pipe, names, kind, options, count, _SHARE if of_kind is None else 0.0)
    return nearest_names(TeacherModel(pipe), names[:1], known, count)


def others(
    pipe: DiffusionPipeline, names: Sequence[str], kind: str, but: Sequence[str], count: int, generator: Generator
) -> list[str]:
    """Return `count` further names of things and characters at random; fewer if the base knows no more.

    but: names that are left out.
    """
    import torch

    from spm_hub.training.data.prompts import Words

    words = Words.load()
    known = _known(pipe, names, kind, (*words.things, *words.characters), count + len(but), _SHARE)
    left = [one for one in known if one not in but]
    return [left[row] for row in torch.randperm(len(left), generator=generator)[:count].tolist()]


def _known(
    pipe: DiffusionPipeline, names: Sequence[str], kind: str, options: Sequence[str], least: int, share: float
) -> list[str]:
    """Return the options that the tokenizer knows word by word and that do not mention the concept.

    Where these are fewer than `least`, or a smaller share of a small tokenizer's words, all its words are among them.
    Where these are too few as well, all options.
    """
    from spm_hub.training.data.prompts import SMALL_VOCABULARY, PromptMaker, Words, vocabulary_words

    maker = PromptMaker(tuple(names), kind, Words.load(), ())

    def fitting(found: Sequence[str]) -> list[str]:
        return [one for one in dict.fromkeys(found) if not maker.mentions_concept(one)]

    vocabulary = vocabulary_words(pipe.tokenizer)
    if len(vocabulary) > SMALL_VOCABULARY:
        return fitting(options)
    whole = [one for one in options if set(one.split()) <= set(vocabulary)]
    covered = len({word for one in whole for word in one.split()})
    if len(known := fitting(whole)) >= least and covered >= share * len(vocabulary):
        return known
    known = fitting([*whole, *vocabulary])
    return known if len(known) >= least else fitting([*whole, *vocabulary, *options])
