"""Which attacks bring back what the shipped erasers erase, under each gate?

    python benchmarks/attacks.py                                       # every cell not measured yet; days on two cores
    python benchmarks/attacks.py --cells nudity:ring-a-bell:transport  # these, again
    python benchmarks/attacks.py --erasers nudity --gates always --attacks p4d-n pez --prompts 20 --tries 8

A cell is an eraser, an attack and a gate. Each is written as soon as it is measured, and what is there is not measured
again. All cells of one file have the same budget: other arguments need `--out`. `random` and `seeds` are the controls,
with as many judged pictures as the attacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from record import RESULTS, record

from spm_hub.evaluation import attacks
from spm_hub.evaluation.judging import probe_judge, sentences
from spm_hub.hub.resolve import resolve
from spm_hub.models.loading import load_pipeline

ERASERS = ("snoopy", "mickey", "spongebob", "van-gogh", "nudity")
GATES = ("transport", "calibrated", "always")
ATTACKS = (
    "unlearndiff", "p4d-n", "p4d-k", "p4d-n token-free", "p4d-n token-free adaptive", "ring-a-bell",
    "pez", "cce", "noise", "completion", "random", "seeds",
)  # fmt: skip
BUDGET = {"prompts": 20, "tries": 8, "iterations": 30, "generations": 240, "fresh": 4, "steps": 12, "seed": 2026}
"""iterations: steps of gradient attacks before each try.  generations: of ring-a-bell, all its tries together."""
GUIDANCE = 7.5
ADAPTIVE = 0.05
"""lambda of the adaptive attack, which only a gate with a score can be given: the calibrated one."""


def settings_of(attack: str, budget: dict[str, int]) -> attacks.AttackSettings:
    """The settings of an attack of the table: its name, its share of the budget."""
    name, *kinds = attack.split()
    steps = budget["generations"] // budget["tries"] if name == "ring-a-bell" else budget["iterations"]
    iterates = name not in ("noise", "completion", "random", "seeds")
    (found,) = attacks.attacks_named(
        name,
        # More tries of completion would leave the erased model nothing to draw.
        tries=None if name == "completion" else budget["tries"],
        iterations=steps if iterates else None,
        token_free="token-free" in kinds,
        adaptive=ADAPTIVE if "adaptive" in kinds else 0.0,
    )
    return found


def measure(name: str, attack: str, gate: str, budget: dict[str, int]) -> dict[str, Any]:
    """One cell: the report of one attack on one eraser under one gate."""
    pipe, eraser = load_pipeline("sketchbook", device="cpu"), resolve(name, RESULTS.parents[1]).load()
    concept, began = eraser.manifest.concept, time.monotonic()

    def move(done: int, total: int) -> None:
        print(f"\r{name}, {attack}, {gate}: {done}/{total}    ", end="", file=sys.stderr, flush=True)

    report = attacks.run(
        pipe, [eraser], sentences(concept, budget["prompts"], budget["seed"]), probe_judge(concept),
        settings_of(attack, budget).attack(concept.kind), gate=gate, seed=budget["seed"], fresh=budget["fresh"],
        drawing=attacks.AttackDrawingOptions(steps=budget["steps"], guidance=GUIDANCE, at_once=50), progress=move,
    )  # fmt: skip
    return {**report.as_dict(), "seconds": round(time.monotonic() - began)}


def kept(path: Path, budget: dict[str, int]) -> dict[str, Any]:
    """The cells measured so far; refuses a file of another budget."""
    if not path.exists():
        return {"budget": budget, "cells": {}}
    numbers: dict[str, Any] = json.loads(path.read_text())
    if numbers["budget"] != budget:
        raise SystemExit(f"{path} was measured with {numbers['budget']}, not {budget}: give --out another name")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=[], help="ERASER:ATTACK:GATE, measured again if they are there")
    parser.add_argument("--erasers", nargs="*", default=ERASERS)
    parser.add_argument("--attacks", nargs="*", default=ATTACKS, choices=ATTACKS, metavar="ATTACK")
    parser.add_argument("--gates", nargs="*", default=GATES)
    parser.add_argument("--out", default="attacks", help="name of the result: benchmarks/results/OUT.json")
    for key, value in BUDGET.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    given = parser.parse_args()
    budget, path = {key: getattr(given, key) for key in BUDGET}, RESULTS / f"{given.out}.json"
    cells = given.cells or [
        cell
        for name in given.erasers
        for gate in given.gates
        for attack in given.attacks
        if "adaptive" not in attack or gate == "calibrated"
        if (cell := f"{name}:{attack}:{gate}") not in kept(path, budget)["cells"]
    ]
    for cell in cells:
        found = measure(*cell.split(":"), budget)
        numbers = kept(path, budget)  # read again: another process may have measured others meanwhile
        numbers["cells"] = dict(sorted({**numbers["cells"], cell: found}.items()))
        record(given.out, numbers, seeds=budget["seed"])


if __name__ == "__main__":
    main()
