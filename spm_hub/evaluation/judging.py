"""Whom an attack is judged by, and the sentences it is made on."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from PIL import Image

from spm_hub.adapters.manifest import Concept
from spm_hub.errors import NotFoundError, UsageError, nearest
from spm_hub.evaluation.attacks import Case, Judge
from spm_hub.evaluation.sketchbook import STYLE_TEMPLATES, SUBJECT_TEMPLATES, Row, cases, count, probe
from spm_hub.evaluation.sketchbook import Case as Wanted
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES

_THINGS = ("a dog", "a church", "a tree", "a car", "a cat")


def probe_judge(concept: Concept) -> Judge:
    """The sketchbook's probe, asked for a concept by any of its names.

    Raises NotFoundError for what the probe was never shown.
    """
    names = {name.lower() for name in (concept.target, *concept.aliases)}
    known = [name for name in (*SUBJECTS, *STYLE_NAMES) if name in names]
    if not known:
        close = nearest(concept.target, (*SUBJECTS, *STYLE_NAMES))
        raise NotFoundError(
            f"the sketchbook's probe does not know {concept.target!r}"
            + (f"; did you mean {' or '.join(close)}?" if close else ""),
            mend="--judge PACKAGE.MODULE:FUNCTION, which takes pictures and says of each whether it shows the concept",
        )

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        return [not {reading.subject, reading.style}.isdisjoint(known) for reading in probe().read(pictures)]

    return judge


def imported_judge(reference: str) -> Judge:
    """The judge at "package.module:function", in the working folder too. Raises UsageError where there is none."""
    module, colon, name = reference.partition(":")
    # A command, other than `python -m`, does not look for modules where it is called.
    sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name) if module and colon and name else None
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"--judge {reference}: {error}", mend="--judge PACKAGE.MODULE:FUNCTION") from None
    finally:
        sys.path.pop()
    if not callable(found):
        raise UsageError(f"--judge {reference!r} is not PACKAGE.MODULE:FUNCTION", mend="--judge my.judges:nude")
    judge: Judge = found
    return judge


def table_of(
    concepts: Sequence[Concept], judge: str | None, samples: int, seed: int
) -> tuple[list[Wanted], Callable[[Sequence[Image.Image]], list[Row]]]:
    """The pictures by which erasers of `concepts` are judged, and what makes their table of them.

    Everything that the sketchbook's probe knows, with `samples` pictures each; or where `judge` ("package.module:
    function") is given, the concepts alone. Raises NotFoundError for what the probe was never shown, UsageError where
    there is no such judge.
    """
    if judge is None:
        for concept in concepts:
            probe_judge(concept)
        wanted = cases(samples=samples, seed=seed)
        return wanted, lambda pictures: count(wanted, pictures)
    sees = imported_judge(judge)
    kinds: list[Literal["subject", "style"]] = ["style" if one.kind == "style" else "subject" for one in concepts]
    asked = [
        Wanted(kind, concept.target, case.prompt, case.seed)
        for kind, concept in zip(kinds, concepts, strict=True)
        for case in sentences(concept, samples, seed)
    ]

    def judged(pictures: Sequence[Image.Image]) -> list[Row]:
        seen = sees(pictures)
        return [
            Row(kind, concept.target, sum(map(bool, seen[at * samples : (at + 1) * samples])) / samples, samples)
            for at, (kind, concept) in enumerate(zip(kinds, concepts, strict=True))
        ]

    return asked, judged


def sentences(concept: Concept, count: int, seed: int) -> list[Case]:
    """`count` prompts for a concept, each with a seed of its own: those that erasers are judged by.

    Of the sketchbook's own subjects and styles they are the cases of its detection table.
    """
    if concept.target in SUBJECTS or concept.target in STYLE_NAMES:
        subjects, styles = ([concept.target], []) if concept.target in SUBJECTS else ([], [concept.target])
        return [Case(case.prompt, case.seed) for case in cases(subjects, styles, samples=count, seed=seed)]
    templates = STYLE_TEMPLATES if concept.kind == "style" else SUBJECT_TEMPLATES
    return [
        Case(templates[i % len(templates)].format(concept.target, thing=_THINGS[i % len(_THINGS)]), seed + i)
        for i in range(count)
    ]
