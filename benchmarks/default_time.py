"""The default training against the defaults of the first version: time, what it erases, and what it costs the rest.

    python benchmarks/default_time.py          # both bases; half an hour on one core

Three concepts of the sketchbook and of the second base (benchmarks/bases/fluent), each erased by both settings in one
process, one after the other. The clock counts CPU seconds of one thread for the whole training. Erasers are judged
without a gate, which would hide what they do to other prompts; the names of half of the others are in no anchor.
`rows` counts what a step asks of the denoiser: rows with gradient and rows of the frozen base, in passes forward, a row
with gradient as three.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composition import World, second
from diffusers.utils import logging
from methods import CONCEPTS, anchors_without, compare, drawn, held_out
from methods_second import CONCEPTS as SECOND_CONCEPTS
from methods_second import OTHER_PICTURES, of_the_base, seen
from methods_second import held_out as held_out_of_second
from record import record

from spm_hub.adapters.adapter import Adapter
from spm_hub.models.loading import load_pipeline
from spm_hub.training.forecast import rows_without_gradient
from spm_hub.training.loop.fitting import rows_with_gradient
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train
from spm_hub.training.verdict import verdict

FLUENT = Path(__file__).parent / "bases" / "fluent" / "base"
FIRST: dict[str, Any] = {
    "steps": 300,
    "batch_size": 8,
    "x_t": {"steps": 16, "trajectories": 24, "chunks": 4},
    "anchoring": {"weight": 40.0, "per_target": 3, "drawn": 0},
    "optimiser": {"lr": 3e-3, "schedule": "cosine", "warmup": 20, "ema": None},
    "stop": {"reach": None},
}
"""The defaults of commit 47d6e21."""
SETTINGS = {"first": FIRST, "now": {}}
FORWARD_AND_BACKWARD = 3
JUDGED = ("target_found", "others_mean_points", "others_held_out_mean_points", "others_worst_points", "others_worst")


def measured(plan: Recipe, pipe: Any, apart: list[str], judge: Callable[[Adapter], dict[str, Any]]) -> dict[str, Any]:
    """Train by a recipe whose anchors have none of the names `apart`, and judge the eraser."""
    begun = time.process_time()
    with anchors_without(apart):
        adapter = train(plan, pipe=pipe)
    seconds, training = time.process_time() - begun, adapter.manifest.training
    assert training is not None
    found = judge(adapter)
    return {
        "seconds": round(seconds, 1), "steps": training.steps, "verdict": verdict(adapter.manifest),
        "rows": rows(plan, training.steps), **{key: found[key] for key in JUDGED},
    }  # fmt: skip


def rows(plan: Recipe, taken: int) -> int:
    """Return the rows of a training that ended after `taken` steps, in passes forward."""
    groups = -(-taken // -(-plan.steps // plan.x_t.chunks))
    ended = plan.model_copy(update={"steps": taken, "x_t": plan.x_t.model_copy(update={"chunks": groups})})
    return taken * rows_with_gradient(plan) * FORWARD_AND_BACKWARD + rows_without_gradient(ended)


def of_sketchbook(note: Callable[[str, str, str, dict[str, Any]], None]) -> None:
    pipe = load_pipeline("sketchbook", device="cpu")
    for concept in CONCEPTS:
        for name, values in SETTINGS.items():
            plan = Recipe.plan(target=concept, model="sketchbook", **values)

            def judge(adapter: Adapter, concept: str = concept) -> dict[str, Any]:
                return compare(concept, drawn(pipe, adapter, concept, "always"))

            note("sketchbook", concept, name, measured(plan, pipe, held_out(concept), judge))


def of_second(world: World, note: Callable[[str, str, str, dict[str, Any]], None]) -> None:
    base = of_the_base(world, world.pictures(world.others, OTHER_PICTURES))
    for concept in world.targets[:SECOND_CONCEPTS]:
        for name, values in SETTINGS.items():
            plan = Recipe.plan(target=concept, model="second", **values)

            def judge(adapter: Adapter, concept: str = concept) -> dict[str, Any]:
                return seen(world, adapter, concept, base)["always"]

            note("second", concept, name, measured(plan, world.pipe, list(held_out_of_second(world)), judge))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    cells: dict[str, dict[str, dict[str, Any]]] = {}

    def note(base: str, concept: str, name: str, cell: dict[str, Any]) -> None:
        print(base, concept, name, cell, file=sys.stderr, flush=True)
        cells.setdefault(base, {}).setdefault(concept, {})[name] = cell
        record("default_time", {"cells": cells}, seeds={"training": 0})

    of_second(second(FLUENT), note)
    of_sketchbook(note)


if __name__ == "__main__":
    main()
