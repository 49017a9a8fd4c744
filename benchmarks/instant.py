"""Erasers of method `instant` on the sketchbook: the concept found, the others' change, and the time.

    python benchmarks/instant.py                # everything not measured yet
    python benchmarks/instant.py snoopy         # a concept again

All names that the table judges are taken out of the words that the eraser's other sentences are made of, so that no
sentence that was held names a subject that is judged. Each eraser is judged under its own gate and at gamma 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from diffusers import DiffusionPipeline
from record import RESULTS, record

from spm_hub import Adapter, attach
from spm_hub.evaluation.sketchbook import DetectionCase, cases, count, paint
from spm_hub.models.loading import load_pipeline
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES
from spm_hub.training.data import prompts
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train

CONCEPTS = ("snoopy", "van gogh", "nudity", "mickey", "spongebob")
TARGET_SAMPLES, OTHER_SAMPLES, SEED, STEPS = 20, 5, 2024, 12
GATES = {"gated": None, "ungated": "always"}


@contextmanager
def names_left_out() -> Iterator[None]:
    """Inside, no sentence about everything else has a word of a judged name."""
    judged = {word for name in (*SUBJECTS, *STYLE_NAMES) for word in name.split()}

    def free(words: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(word for word in words if judged.isdisjoint(word.replace("-", " ").split()))

    whole, vocabulary = prompts.Words.load(), prompts.vocabulary_words
    left = prompts.Words(**{part: free(words) for part, words in vars(whole).items()})
    with (
        mock.patch.object(prompts.Words, "load", return_value=left),
        mock.patch.object(prompts, "vocabulary_words", lambda tokenizer: free(vocabulary(tokenizer))),
    ):
        yield


def wanted(concept: str) -> list[DetectionCase]:
    """The target's cases and everybody else's."""
    return [case for case in cases(samples=TARGET_SAMPLES, seed=SEED) if case.name == concept] + [
        case for case in cases(samples=OTHER_SAMPLES, seed=SEED) if case.name != concept
    ]


def found(pipe: DiffusionPipeline, asked: list[DetectionCase]) -> dict[str, float]:
    """The share of pictures in which the probe finds each name."""
    return {f"{row.kind} {row.name}": row.detected for row in count(asked, paint(pipe, asked, steps=STEPS))}


def judged(pipe: DiffusionPipeline, adapter: Adapter, concept: str, gate: str | None) -> dict[str, Any]:
    """The concept found, and the others' change in points."""
    asked = wanted(concept)
    before = kept()["base"]
    with attach(pipe, [adapter], gate=gate, progress=False):
        after = found(pipe, asked)
    own = next(name for name in after if name.partition(" ")[2] == concept)
    changes = {name: 100 * (share - before[name]) for name, share in after.items() if name != own}
    worst = min(changes, key=lambda name: changes[name])
    return {
        "found": round(after[own], 3), "others_mean_points": round(sum(changes.values()) / len(changes), 2),
        "others_worst_points": round(changes[worst], 1), "others_worst": worst,
    }  # fmt: skip


def kept() -> dict[str, Any]:
    """What has been measured so far."""
    file = RESULTS / "instant.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    return numbers


def measure(concept: str) -> None:
    """One row of the table, kept as soon as each half is known."""
    pipe = load_pipeline("sketchbook")
    numbers = kept() | {
        "samples": {"target": TARGET_SAMPLES, "others": OTHER_SAMPLES}, "steps": STEPS, "guidance_scale": 7.5,
        "names_left_out_of_other_sentences": True,
    }  # fmt: skip
    if "base" not in numbers:
        numbers["base"] = found(pipe, cases(samples=OTHER_SAMPLES, seed=SEED))
        record("instant", numbers, seeds=SEED)
    with names_left_out():
        begun, clock = time.process_time(), time.perf_counter()
        adapter = train(Recipe.plan(target=concept, method="instant", model="sketchbook"), pipe=pipe)
        row: dict[str, Any] = {
            "cpu_seconds": round(time.process_time() - begun, 1), "seconds": round(time.perf_counter() - clock, 1),
        }  # fmt: skip
    for name, gate in sorted(GATES.items(), reverse=True):
        row[name] = judged(pipe, adapter, concept, gate)
        print(concept, name, row, file=sys.stderr, flush=True)
    numbers = kept()
    numbers["cells"][concept] = row
    record("instant", numbers, seeds=SEED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="*", help="concepts; all that are not measured yet unless given")
    for one in parser.parse_args().concepts or [name for name in CONCEPTS if name not in kept()["cells"]]:
        measure(one)
