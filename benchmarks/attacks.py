"""Which attacks bring back what the shipped erasers, or a method's, erase, under each gate?

    python benchmarks/attacks.py                                       # every cell not measured yet; hours on one core
    python benchmarks/attacks.py --methods instant spm                 # erasers by these methods' presets instead
    python benchmarks/attacks.py --cells nudity:ring-a-bell:transport  # these, again
    python benchmarks/attacks.py --erasers nudity --gates always --attacks p4d-n pez

A cell is an eraser, an attack and a gate. The gates of one eraser and attack are measured together, because they have
much in common (`attacks.run_gates`), and written when they are done; what is there is not measured again. All cells of
one file have the same budget: other arguments need `--out`. `--methods` trains erasers of three concepts, keeps them in
`--work`, calls them METHOD/CONCEPT, and writes attacks_methods.json. `random` and `seeds` are the controls, with as
many judged pictures as the attacks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RESULTS, record

from spm_hub.adapters.adapter import Adapter
from spm_hub.evaluation import attacks
from spm_hub.evaluation.judging import probe_judge, sentences
from spm_hub.hub.resolve import resolve
from spm_hub.models.loading import load_pipeline
from spm_hub.registry.registry import Registry
from spm_hub.training import Recipe, train

ERASERS = ("nudity", "van-gogh", "snoopy", "mickey", "spongebob")
TRAINED = ERASERS[:3]
"""Concepts of `--methods`."""
GATES = ("transport", "calibrated", "evidence", "always")
ATTACKS = (
    "p4d-n token-free", "unlearndiff", "ring-a-bell", "p4d-n token-free adaptive", "p4d-n", "p4d-k", "cce", "pez",
    "random", "seeds", "noise", "completion",
)  # fmt: skip
BUDGET = {
    "prompts": 20, "tries": 8, "iterations": 20, "generations": 96, "population": 100, "fresh": 3, "steps": 12,
    "seed": 88001,
}  # fmt: skip
"""iterations: steps of gradient attacks before each try.  generations: of ring-a-bell, all its tries together."""
GUIDANCE = 7.5
ADAPTIVE = 0.05
"""lambda of the adaptive attack, which only a gate with a score can be given: the calibrated one."""


def attack_named(attack: str, budget: dict[str, int], kind: str) -> attacks.Attack:
    """An attack of the table with its share of the budget, on a concept of a kind."""
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
    made = found.attack(kind)
    return replace(made, population=budget["population"]) if isinstance(made, attacks.RingABell) else made


def eraser_named(name: str, work: Path) -> Adapter:
    """Return a shipped eraser, or one of METHOD/CONCEPT, which is trained unless `work` has it."""
    method, _, concept = name.rpartition("/")
    if not method:
        return resolve(name, RESULTS.parents[1]).load()
    registry = Registry(work / method)
    if registry.find(concept) is None:
        recipe = Recipe.plan(target=concept.replace("-", " "), method=method)
        registry.add(train(recipe, pipe=load_pipeline("sketchbook", device="cpu")))
    return registry.get(concept).load()


def measure(name: str, attack: str, gates: Sequence[str], budget: dict[str, int], work: Path) -> dict[str, Any]:
    """The reports of one attack on one eraser, by cell, one for each gate."""
    pipe, eraser = load_pipeline("sketchbook", device="cpu"), eraser_named(name, work)
    concept, began = eraser.manifest.concept, time.process_time()

    def move(done: int, total: int) -> None:
        print(f"\r{name}, {attack}, {', '.join(gates)}: {done}/{total}    ", end="", file=sys.stderr, flush=True)

    reports = attacks.run_gates(
        pipe, [eraser], sentences(concept, budget["prompts"], budget["seed"]), probe_judge(concept),
        [attack_named(attack, budget, concept.kind)], gates, seed=budget["seed"], fresh=budget["fresh"],
        drawing=attacks.AttackDrawingOptions(steps=budget["steps"], guidance=GUIDANCE, at_once=50), progress=move,
    )  # fmt: skip
    seconds = round((time.process_time() - began) / len(gates))
    return {
        f"{name}:{attack}:{gate}": {**report.as_dict(), "cpu_seconds": seconds}
        for gate, (report,) in zip(gates, reports, strict=True)
    }


def kept(path: Path, budget: dict[str, int]) -> dict[str, Any]:
    """The cells measured so far; refuses a file of another budget."""
    if not path.exists():
        return {"budget": budget, "cells": {}}
    numbers: dict[str, Any] = json.loads(path.read_text())
    if numbers["budget"] != budget:
        raise SystemExit(f"{path} was measured with {numbers['budget']}, not {budget}: give --out another name")
    return numbers


def together(cells: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Cells by eraser and attack: each with its gates."""
    groups: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        name, attack, gate = cell.split(":")
        groups.setdefault((name, attack), []).append(gate)
    for (name, attack), gates in groups.items():
        yield name, attack, gates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=[], help="ERASER:ATTACK:GATE, measured again if they are there")
    parser.add_argument("--erasers", nargs="*", default=ERASERS)
    parser.add_argument("--methods", nargs="*", default=[], help="attack erasers by these methods")
    parser.add_argument("--work", type=Path, default=Path("attacked"), help="folder for the erasers of --methods")
    parser.add_argument("--attacks", nargs="*", default=ATTACKS, choices=ATTACKS, metavar="ATTACK")
    parser.add_argument("--gates", nargs="*", default=GATES)
    parser.add_argument("--out", help="name of the result: benchmarks/results/OUT.json")
    for key, value in BUDGET.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    given = parser.parse_args()
    out = given.out or ("attacks_methods" if given.methods else "attacks")
    erasers = [f"{method}/{name}" for method in given.methods for name in TRAINED] or given.erasers
    budget, path = {key: getattr(given, key) for key in BUDGET}, RESULTS / f"{out}.json"
    there = kept(path, budget)["cells"]
    cells = given.cells or [
        cell
        for attack in given.attacks
        for name in erasers
        for gate in given.gates
        if "adaptive" not in attack or gate == "calibrated"
        if (cell := f"{name}:{attack}:{gate}") not in there
    ]
    for name, attack, gates in together(cells):
        found = measure(name, attack, gates, budget, given.work)
        numbers = kept(path, budget)  # read again: another process may have measured others meanwhile
        numbers["cells"] = dict(sorted({**numbers["cells"], **found}.items()))
        record(out, numbers, seeds=budget["seed"])


if __name__ == "__main__":
    main()
