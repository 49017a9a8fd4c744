"""Whom an attack is judged by, and the sentences it is made on."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from PIL import Image

from spm_hub.attacks import Case, Judge
from spm_hub.errors import NotFoundError, UsageError, nearest
from spm_hub.manifest import Concept
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES

from .sketchbook import STYLE_TEMPLATES, SUBJECT_TEMPLATES, cases, probe

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
    """The judge at "package.module:function". Raises UsageError where there is none."""
    module, colon, name = reference.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if module and colon and name else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--judge {reference}: {error}", mend="--judge PACKAGE.MODULE:FUNCTION") from None
    if not callable(found):
        raise UsageError(f"--judge {reference!r} is not PACKAGE.MODULE:FUNCTION", mend="--judge my.judges:nude")
    judge: Judge = found
    return judge


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
