"""Judges that decide whether pictures show a concept, and the prompts that they are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from spm_hub.adapters.manifest import Concept
from spm_hub.errors import NotFoundError, did_you_mean
from spm_hub.evaluation.attacks import Case, Judge
from spm_hub.evaluation.metrics.named import judge_named, judge_of_subject, known_metrics
from spm_hub.evaluation.pictures import read_prompts
from spm_hub.evaluation.sketchbook import (
    STYLE_TEMPLATES,
    SUBJECT_TEMPLATES,
    DetectionCase,
    DetectionRow,
    cases,
    count,
    probe,
)
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES

_THINGS = ("a dog", "a church", "a tree", "a car", "a cat")


def probe_judge(concept: Concept) -> Judge:
    """Return a judge that asks the sketchbook's probe for a concept by any of its names.

    Raises NotFoundError for a concept that the probe was not trained on, UsageError for an unknown one.
    """
    target = concept.require_target()
    names = {name.lower() for name in concept.names}
    known = [name for name in (*SUBJECTS, *STYLE_NAMES) if name in names]
    if not known:
        hint = did_you_mean(target, (*SUBJECTS, *STYLE_NAMES))
        raise NotFoundError(
            f"the sketchbook's probe does not know {target!r}{hint}",
            mend="--judge PACKAGE.MODULE:FUNCTION, a function from pictures to one bool each: is the concept shown?",
        )

    def judge(pictures: Sequence[Image.Image]) -> list[bool]:
        return [not {reading.subject, reading.style}.isdisjoint(known) for reading in probe().read(pictures)]

    return judge


def judge_of_concept(text: str | None, concept: Concept) -> tuple[Judge, str]:
    """Return the judge of a concept and its key in records.

    text: a name that `judge_named` knows, or MODULE:FUNCTION; None for the sketchbook's probe.
    Raises NotFoundError or UsageError as `probe_judge` and `judge_of_subject` do.
    """
    if text is None:
        return probe_judge(concept), "probe"
    key = judge_named(text).key if text.partition(":")[0] in known_metrics() else text
    return judge_of_subject(text, concept.target or ""), key


def table_of(
    concepts: Sequence[Concept], judge: str | None, samples: int, seed: int
) -> tuple[list[DetectionCase], Callable[[Sequence[Image.Image]], list[DetectionRow]]]:
    """Return the pictures to draw to judge erasers, and a function from pictures to table rows.

    judge: a text that `judge_of_subject` knows; the table then has the concepts only. By default the sketchbook's probe
    judges, and the table has every subject and style that it knows. `samples` pictures are drawn for each.
    Raises NotFoundError for a concept that the probe was not trained on, UsageError for an unknown concept and if
    `judge` cannot be imported.
    """
    if judge is None:
        for concept in concepts:
            probe_judge(concept)
        wanted = cases(samples=samples, seed=seed)
        return wanted, lambda pictures: count(wanted, pictures)
    kinds: list[Literal["subject", "style"]] = ["style" if one.kind == "style" else "subject" for one in concepts]
    targets = [concept.require_target() for concept in concepts]
    shown = [judge_of_subject(judge, target) for target in targets]
    asked = [
        DetectionCase(kind, target, case.prompt, case.seed)
        for kind, target, concept in zip(kinds, targets, concepts, strict=True)
        for case in sentences(concept, samples, seed)
    ]

    def judged(pictures: Sequence[Image.Image]) -> list[DetectionRow]:
        parts = [pictures[at * samples : (at + 1) * samples] for at in range(len(targets))]
        return [
            DetectionRow(kind, target, sum(map(bool, judged_by(part))) / samples, samples)
            for kind, target, judged_by, part in zip(kinds, targets, shown, parts, strict=True)
        ]

    return asked, judged


def cases_for(concept: Concept, prompts: int | Path, seed: int) -> list[Case]:
    """Return prompts for a concept, each with its own seed: that many, or those of a file.

    A file has one prompt a line.
    Raises NotFoundError or UsageError for a file that cannot be read.
    """
    if isinstance(prompts, int):
        return sentences(concept, prompts, seed)
    return [Case(text, seed + row) for row, text in enumerate(read_prompts(prompts))]


def sentences(concept: Concept, count: int, seed: int) -> list[Case]:
    """Return `count` prompts for a concept, each with its own seed.

    For subjects and styles of the sketchbook they are the cases of its detection table. Raises UsageError for an
    unknown concept.
    """
    target = concept.require_target()
    if target in SUBJECTS or target in STYLE_NAMES:
        subjects, styles = ([target], []) if target in SUBJECTS else ([], [target])
        return [Case(case.prompt, case.seed) for case in cases(subjects, styles, samples=count, seed=seed)]
    templates = STYLE_TEMPLATES if concept.kind == "style" else SUBJECT_TEMPLATES
    return [
        Case(templates[i % len(templates)].format(target, thing=_THINGS[i % len(_THINGS)]), seed + i)
        for i in range(count)
    ]
