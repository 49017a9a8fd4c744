"""Do the shipped erasers erase, and leave the rest alone?

Alone, together, and on a checkpoint they were never trained on.

    python benchmarks/sketchbook.py          # first: the bare checkpoints
    python benchmarks/erasure.py             # all erasers of the repository, some minutes on two cores
    python benchmarks/erasure.py snoopy      # one; the others' numbers stay as they were

For each eraser: how often the probe names each subject and style in the base's pictures without and with it (50
pictures each, guidance 7.5, sentences no eraser was trained on). What no eraser acts on is not drawn again. The numbers
go into benchmarks/results/ and into the erasers' manifests.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from record import RESULTS, record
from sketchbook import SAMPLES, SEED, STEPS

from spm_hub import attach
from spm_hub.adapters.manifest import GateName
from spm_hub.evaluation.sketchbook import DetectionRow, cases, detection_table, evaluations
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry

ROOT = Path(__file__).parents[1]
ERASERS = ("snoopy", "mickey", "spongebob", "nudity", "van-gogh")
TOGETHER = ("snoopy", "mickey", "spongebob")
TRANSFER = ("snoopy", "van-gogh")
GATE: GateName = "calibrated"


def bare(model: str) -> list[DetectionRow]:
    """The checkpoint's own table, from benchmarks/sketchbook.py: the same cases, seeds and steps."""
    rows = []
    for key, detected in json.loads((RESULTS / "sketchbook.json").read_text())["checkpoints"][model][
        "detected"
    ].items():
        kind, name = key.split(" ", 1)
        rows.append(DetectionRow("style" if kind == "style" else "subject", name, detected, SAMPLES))
    return rows


def measure(model: str, names: tuple[str, ...]) -> list[DetectionRow]:
    """The table with the named erasers attached.

    Subjects and styles in all of whose prompts every gamma is 0 have the base's row: their pictures are the base's, bit
    for bit (tests/attachment/gates).
    """

    def tell(done: int, total: int) -> None:
        print(f"\r{model} {'+'.join(names)} {done}/{total}   ", end="", file=sys.stderr, flush=True)

    pipe = load_pipeline(model, device="cpu", dtype="float32")
    with attach(pipe, [Registry(ROOT).get(name).load() for name in names], gate=GATE, progress=False) as erasers:
        acting = {
            (case.kind, case.name)
            for case in cases(samples=SAMPLES, seed=SEED)
            if any(erasers.gates(case.prompt).values())
        }
        subjects, styles = ([name for each, name in sorted(acting) if each == kind] for kind in ("subject", "style"))
        drawn = detection_table(pipe, subjects, styles, samples=SAMPLES, seed=SEED, steps=STEPS[model], progress=tell)
    given = {(row.kind, row.name): row for row in drawn}
    return [given.get((row.kind, row.name), row) for row in bare(model)]


def compare(without: list[DetectionRow], given: list[DetectionRow], erased: tuple[str, ...]) -> dict[str, Any]:
    """Erased concepts' detections, and the worst and mean change of all others in points."""
    targets = {name.replace("-", " ") for name in erased}
    before = {(row.kind, row.name): row.detected for row in without}
    changes = {f"{row.kind} {row.name}": round(100 * (row.detected - before[row.kind, row.name]), 1) for row in given}
    others = {key: change for key, change in changes.items() if key.split(" ", 1)[1] not in targets}
    erased_rows = [row for row in given if row.name in targets]
    return {
        "gate": GATE,
        "erased": {row.name: {"without": before[row.kind, row.name], "with": row.detected} for row in erased_rows},
        "others_worst_change_points": min(others.values()),
        "others_mean_change_points": round(sum(others.values()) / len(others), 2),
        "changes_points": {key: change for key, change in others.items() if change},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="erasers, `together`, `transfer`; everything unless given")
    parts = parser.parse_args().parts or [*ERASERS, "together", "transfer"]
    file = RESULTS / "erasure.json"
    numbers: dict[str, Any] = (
        json.loads(file.read_text()) if file.exists() else {"alone": {}, "transferred_to_chalk": {}}
    )
    numbers |= {"samples_per_name": SAMPLES, "guidance_scale": 7.5, "steps": STEPS}
    registry = Registry(ROOT)
    for part in parts:
        if part == "together":
            numbers["together"] = compare(bare("sketchbook"), measure("sketchbook", TOGETHER), TOGETHER)
        elif part == "transfer":
            for name in TRANSFER:
                given = measure("sketchbook-chalk", (name,))
                numbers["transferred_to_chalk"][name] = compare(bare("sketchbook-chalk"), given, (name,))
        else:
            given = measure("sketchbook", (part,))
            numbers["alone"][part] = compare(bare("sketchbook"), given, (part,))
            registry.record_evaluation(
                part,
                evaluations(
                    bare("sketchbook"),
                    given,
                    base="sketchbook",
                    seed=SEED,
                    steps=STEPS["sketchbook"],
                    guidance=7.5,
                    gate=GATE,
                ),
            )
        record("erasure", numbers, seeds=SEED)
