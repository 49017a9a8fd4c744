"""Builds the prompt rows of a protocol for given erasers, from its sets or from a file of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

from spm_hub.adapters.manifest import Concept
from spm_hub.attachment.text_encoding import encode_together
from spm_hub.errors import UsageError
from spm_hub.evaluation.protocols.protocol import RowSet, Variant
from spm_hub.evaluation.records.rows import PromptRow
from spm_hub.evaluation.sketchbook import noun
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES

SEEDS_APART = 100_003
"""Between the first seeds of two subjects."""

Nearest = Callable[[str, Sequence[str], int], tuple[str, ...]]
"""Returns the names of a list that are nearest to a name, so many of them."""


def rows_of(
    variant: Variant,
    concepts: Sequence[Concept],
    *,
    seed: int,
    nearest: Nearest,
    samples: int | None = None,
    given: Sequence[PromptRow] = (),
) -> tuple[PromptRow, ...]:
    """Return the rows of a protocol: for each of its sets those of each subject, or whole sentences.

    seed: of the first picture. nearest: asked where a set wants neighbours. samples: at most so many of each subject.
    given: rows of a file, in place of the first set and others of its role and group; rows of another subject are of
    neighbours.
    Raises UsageError for an eraser of an unknown concept, and if there is no row.
    """
    targets = [(concept.require_target(), concept.kind) for concept in concepts]
    erased = {name.casefold() for concept in concepts for name in concept.names}
    rows = [one if one.subject.casefold() in erased else replace(one, role="neighbour") for one in given]
    place = 0
    first = variant.sets[0]
    for one in variant.sets:
        if given and (one.role, one.group) == (first.role, first.group):
            continue
        count = one.samples if samples is None else min(samples, one.samples)
        subjects = _subjects(one, targets, erased, nearest)
        for subject, kind in subjects:
            start = seed + SEEDS_APART * place
            place += 1
            rows += _rows_of_subject(one, subject, kind, count, start, erased)
    if not rows:
        raise UsageError("the protocol has no row for these erasers", mend="another protocol: spmhub protocols")
    return tuple(replace(row, id=f"{number:06d}") for number, row in enumerate(rows))


def _subjects(
    one: RowSet, targets: Sequence[tuple[str, str]], erased: set[str], nearest: Nearest
) -> list[tuple[str, str]]:
    """Return the subjects of a set with their kinds; ("", "") for sentences without one."""
    if one.sentences:
        return [("", "")]
    if one.subjects == "erased":
        return [(name, kind) for name, kind in targets if not one.kinds or kind in one.kinds]
    if one.nearest is None:
        names: Sequence[str] = [name for name in one.subjects if name.casefold() not in erased]
    else:
        among = [name for name in one.nearest.among if name.casefold() not in erased]
        shares = [nearest(target, among, one.nearest.count) for target, _ in targets]
        # The nearest of each eraser in turn, until there are enough.
        ranked = [name for rank in zip(*shares, strict=True) for name in rank]
        names = list(dict.fromkeys(ranked))[: one.nearest.count]
    return [(name, "") for name in names]


def _rows_of_subject(one: RowSet, subject: str, kind: str, count: int, seed: int, erased: set[str]) -> list[PromptRow]:
    sentences = one.sentences or one.templates
    shown = phrase(subject, kind) if subject else ""
    shown = one.names.get(shown, shown)
    judged = one.also or (subject,) * len(sentences)
    # What is erased cannot be asked to stay.
    choice = [pair for pair in zip(sentences, judged, strict=True) if not one.also or pair[1] not in erased]
    return [
        PromptRow("", sentence.format(shown), seed + i, looked_for, one.role, group=one.group)
        for i, (sentence, looked_for) in zip(range(count), cycle(choice), strict=False)
    ]


def phrase(name: str, kind: str) -> str:
    """Return a name as it is in a sentence: "a dog", "snoopy", "Van Gogh", "a nude person".

    kind: of the concept, "" for unknown. Names of people, characters and styles, and names with a capital, have no
    article; a name that has one already keeps it.
    """
    plain = name.casefold()
    if plain in SUBJECTS:
        return noun(plain)
    proper = kind in ("character", "person", "style", "nsfw", "other") or plain in STYLE_NAMES or name[:1].isupper()
    if proper or plain.startswith(("a ", "an ", "the ")):
        return name
    return f"{'an' if plain[0] in 'aeiou' else 'a'} {name}"


def nearest_by_text(pipe: DiffusionPipeline) -> Nearest:
    """Return the function that finds the nearest names by the pipeline's text encoder.

    Nearness is the cosine of the states of two names, all positions together, after those of "" are subtracted.
    """

    def nearest(name: str, among: Sequence[str], count: int) -> tuple[str, ...]:
        # One text at a time: a row may depend on the others of its batch in the last bit.
        empty, own, *others = (
            encode_together(pipe, type(pipe), [text]).float().flatten() for text in ("", name, *among)
        )
        cosines = torch.stack([F.cosine_similarity(own - empty, other - empty, dim=0) for other in others])
        order = sorted(range(len(among)), key=lambda place: (-round(float(cosines[place]), 4), place))
        return tuple(among[place] for place in order[:count])

    return nearest
