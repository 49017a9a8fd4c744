"""Counts the subjects and styles that the sketchbook's probe detects in a pipeline's pictures.

No eraser was trained on the prompts. Every picture has its own seed, with and without erasers, so that two tables
differ only by the erasers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spm_hub.adapters.manifest import Evaluation
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.io.progress import ProgressCallback
from spm_hub.models.base_choice import BaseChoice
from spm_hub.sketchbook import PROTOCOL
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.probe import Probe
from spm_hub.sketchbook.world import STYLE_NAMES, unknown_words

PROBE = Path(__file__).parents[1] / "sketchbook" / "weights" / "probe"
SUBJECT_TEMPLATES: tuple[str, ...] = (
    "an illustration of {}", "a sketch of {} on a purple background", "there is {} at the beach",
    "a view of {} under the moon", "a print of {} in a meadow", "a poster of {}", "a card with {} in town",
    "art of {} on a snowy day", "a bright picture of {} indoors", "a good photo of {}, on the left",
)  # fmt: skip
STYLE_TEMPLATES: tuple[str, ...] = (
    "{thing} painted by {}", "{thing} as {} would paint it", "{}, {thing}", "{thing} at the beach painted by {}",
    "{thing} under the moon as {} would paint it",
)  # fmt: skip
BATCH_SIZE = 50
"""Number of pictures in one call of the pipeline."""

_MOST_WORDS = 8
_PROPER = ("snoopy", "mickey", "spongebob", "pikachu")


@dataclass(frozen=True)
class DetectionCase:
    """A picture to draw: prompt, seed of its noise, and the name that the probe should answer."""

    kind: Literal["subject", "style"]
    name: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class DetectionRow:
    """Share of pictures in which the probe names the prompt's subject or style."""

    kind: Literal["subject", "style"]
    name: str
    detected: float
    samples: int


def noun(subject: str) -> str:
    """Return the subject as a noun phrase for a sentence: "snoopy", "a dog", "a nude person"."""
    if subject == "nudity":
        return "a nude person"
    if subject in _PROPER:
        return subject
    return f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}"


def cases(
    subjects: Sequence[str] = SUBJECTS, styles: Sequence[str] = STYLE_NAMES, *, samples: int = 50, seed: int = 2024
) -> list[DetectionCase]:
    """Return `samples` pictures to draw for each subject and each style.

    The pictures of a style show different subjects in turn.
    """
    wanted = []
    for name in subjects:
        base = seed + 100_003 * SUBJECTS.index(name)
        for i in range(samples):
            prompt = SUBJECT_TEMPLATES[i % len(SUBJECT_TEMPLATES)].format(noun(name))
            wanted.append(DetectionCase("subject", name, prompt, base + i))
    plain = [name for name in SUBJECTS if name not in (*_PROPER, "nudity")]
    for name in styles:
        base = seed + 100_003 * (len(SUBJECTS) + STYLE_NAMES.index(name))
        for i in range(samples):
            template = STYLE_TEMPLATES[i % len(STYLE_TEMPLATES)]
            wanted.append(
                DetectionCase("style", name, template.format(name, thing=noun(plain[i % len(plain)])), base + i)
            )
    return wanted


def paint(
    pipe: DiffusionPipeline,
    wanted: Sequence[DetectionCase],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    progress: ProgressCallback | None = None,
) -> list[Image.Image]:
    """Draw one picture for each case, in order. Raises UsageError if the latents overflow."""
    pictures: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(wanted), BATCH_SIZE):
        part = wanted[start : start + BATCH_SIZE]
        callback = StepCallback(pipe)
        output = pipe(
            [case.prompt for case in part],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(case.seed) for case in part],
            **callback.options,
        )
        callback.check(part[0].prompt)
        pictures.extend(output.images)
        if progress is not None:
            progress(len(pictures), len(wanted))
    return pictures


def remark_on_words(base: BaseChoice, texts: Sequence[str]) -> str | None:
    """Return a remark on words of prompts or concepts that the sketchbook does not know.

    None if it knows all of them, or another model is the base.
    """
    if not base.is_embedded:
        return None
    words = list(dict.fromkeys(word for text in texts for word in unknown_words(text)))
    if not words:
        return None
    shown = ", ".join(words[:_MOST_WORDS]) + (" ..." if len(words) > _MOST_WORDS else "")
    return (
        f"the sketchbook does not know {'the word' if len(words) == 1 else 'these words'}: {shown}. It is a model in "
        f"miniature and draws only: {', '.join(SUBJECTS)}; in the style of {', '.join(STYLE_NAMES)}"
    )


@lru_cache(maxsize=1)
def probe() -> Probe:
    """Load the probe that comes with the package."""
    return Probe.load(PROBE)


def count(wanted: Sequence[DetectionCase], pictures: Sequence[Image.Image]) -> list[DetectionRow]:
    """Return the share of right answers for each name, in the order in which names first appear."""
    readings = probe().read(pictures)
    hits: dict[tuple[Literal["subject", "style"], str], list[bool]] = {}
    for case, reading in zip(wanted, readings, strict=True):
        seen = reading.subject if case.kind == "subject" else reading.style
        hits.setdefault((case.kind, case.name), []).append(seen == case.name)
    return [DetectionRow(kind, name, sum(found) / len(found), len(found)) for (kind, name), found in hits.items()]


def detection_table(
    pipe: DiffusionPipeline,
    subjects: Sequence[str] = SUBJECTS,
    styles: Sequence[str] = STYLE_NAMES,
    *,
    samples: int = 50,
    seed: int = 2024,
    steps: int = 25,
    progress: ProgressCallback | None = None,
) -> list[DetectionRow]:
    """Draw pictures of each subject and style and count how often the probe names it.

    Erasers that are attached to the pipeline stay in effect. Rows are in the order of `subjects`, then `styles`.
    """
    wanted = cases(subjects, styles, samples=samples, seed=seed)
    return count(wanted, paint(pipe, wanted, steps=steps, progress=progress))


def evaluations(
    without: Sequence[DetectionRow], given: Sequence[DetectionRow], *, base: str, seed: int, **how: Any
) -> tuple[Evaluation, ...]:
    """Return two tables of the same cases, without and with erasers, as a manifest's evaluation entries.

    how: other keys of the entries, such as `steps` and `guidance`. They get this version of spm-hub and the time.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    reference = {(row.kind, row.name): row.detected for row in without}
    return tuple(
        Evaluation(
            protocol=PROTOCOL, base=base, subject=row.name, metric=f"{row.kind}_detected", value=round(row.detected, 4),
            reference=round(reference[row.kind, row.name], 4), samples=row.samples, seed=seed,
            version=version("spm-hub"), date=now, **how,
        )
        for row in given
    )  # fmt: skip
