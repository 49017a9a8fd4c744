"""Do the shipped erasers erase, and leave the rest alone?

Alone, together, and on a checkpoint they were never trained on.

    python benchmarks/erasure.py                 # all erasers of the repository, about half an hour on two cores
    python benchmarks/erasure.py snoopy          # one

For each eraser: how often the probe names each subject and style in the base's pictures without and with it (50
pictures each, guidance 7.5, sentences no eraser was trained on). The numbers go into benchmarks/results/ and into the
erasers' manifests.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from record import record

from spm_hub import attach
from spm_hub.evaluation.sketchbook import Row, detection_table, evaluations
from spm_hub.hub.registry import Registry
from spm_hub.models import load_pipeline

ROOT = Path(__file__).parents[1]
ERASERS = ("snoopy", "mickey", "spongebob", "nudity", "van-gogh")
TOGETHER = ("snoopy", "mickey", "spongebob")
TRANSFER = ("snoopy", "nudity", "van-gogh")
SEED = 2024
STEPS = 20


def measure(model: str, names: tuple[str, ...], samples: int) -> list[Row]:
    pipe = load_pipeline(model)

    def tell(done: int, total: int) -> None:
        print(f"\r{model} {'+'.join(names) or 'bare'} {done}/{total}   ", end="", file=sys.stderr, flush=True)

    if not names:
        return detection_table(pipe, samples=samples, seed=SEED, steps=STEPS, progress=tell)
    with attach(pipe, [Registry(ROOT).get(name).load() for name in names]):
        return detection_table(pipe, samples=samples, seed=SEED, steps=STEPS, progress=tell)


def compare(without: list[Row], given: list[Row], erased: tuple[str, ...]) -> dict[str, Any]:
    """Erased concepts' detections, and the worst and mean change of all others in points."""
    targets = {name.replace("-", " ") for name in erased}
    before = {(row.kind, row.name): row.detected for row in without}
    changes = {f"{row.kind} {row.name}": round(100 * (row.detected - before[row.kind, row.name]), 1) for row in given}
    others = {key: change for key, change in changes.items() if key.split(" ", 1)[1] not in targets}
    erased_rows = [row for row in given if row.name in targets]
    return {
        "erased": {row.name: {"without": before[row.kind, row.name], "with": row.detected} for row in erased_rows},
        "others_worst_change_points": min(others.values()),
        "others_mean_change_points": round(sum(others.values()) / len(others), 2),
        "changes_points": {key: change for key, change in others.items() if change},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ERASERS))
    parser.add_argument("--samples", type=int, default=50)
    options = parser.parse_args()
    every = tuple(options.names)
    bare = measure("sketchbook", (), options.samples)
    numbers: dict[str, Any] = {
        "samples_per_name": options.samples,
        "guidance_scale": 7.5,
        "steps": STEPS,
        "bare": {f"{row.kind} {row.name}": row.detected for row in bare},
        "alone": {},
    }
    registry = Registry(ROOT)
    for name in every:
        given = measure("sketchbook", (name,), options.samples)
        numbers["alone"][name] = compare(bare, given, (name,))
        registry.record_evaluation(name, evaluations(bare, given, base="sketchbook", seed=SEED))
        print(name, numbers["alone"][name], file=sys.stderr)
    if set(TOGETHER) <= set(every):
        numbers["together"] = compare(bare, measure("sketchbook", TOGETHER, options.samples), TOGETHER)
        print("together", numbers["together"], file=sys.stderr)
        chalk = measure("sketchbook-chalk", (), options.samples)
        numbers["bare_on_chalk"] = {f"{row.kind} {row.name}": row.detected for row in chalk}
        numbers["transferred_to_chalk"] = {}
        for name in TRANSFER:
            moved = compare(chalk, measure("sketchbook-chalk", (name,), options.samples), (name,))
            numbers["transferred_to_chalk"][name] = moved
            print("chalk", name, moved, file=sys.stderr)
        record("erasure", numbers, seeds=SEED)
