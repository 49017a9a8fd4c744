"""Every method's preset on another base than the sketchbook: what it erases, and what it costs the rest.

    python benchmarks/methods_second.py --second benchmarks/bases/fluent/base            # every cell not measured yet
    python benchmarks/methods_second.py --second benchmarks/bases/fluent/base spm esd-x  # these methods, again
    python benchmarks/methods_second.py --second benchmarks/bases/fluent/base --said     # only what `spmhub train` says
    python benchmarks/methods_second.py --second FOLDER/base --out methods_third         # on a third base

The presets of ESD and UCE were chosen on the sketchbook and on the second base, all others on the sketchbook alone. The
third base shows silhouettes: `second_base.py --world silhouettes --drawings 12000` made it. It was looked at for
this measurement, when all presets but ESD's stood; ESD's was tried on one subject of each base, this one too, and then
taken as it was.

The base, its others and its targets are those of benchmarks/composition.py; its first three targets are erased one at a
time. A classifier names the subjects of pictures drawn from the same noise with and without the eraser, under the
calibrated gate and without a gate. Anchors are made of general words and of all words that the base's tokenizer knows.
Half of the others' names are taken out of both for this benchmark, so that no anchor has them; they are counted apart.
`verdict` is what `spmhub train` itself prints about its eraser; `recognised` and `others_recognised` are the shares in
it: of pictures in which the base still recognises the concept, and of other names.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from composition import STEPS, Picture, World, key, readings, second, shares
from diffusers.utils import logging
from methods import TRAINED, anchors_without, said, said_again
from record import RESULTS, record

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter
from spm_hub.hub.making.quick_look import looked
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train

CONCEPTS, TARGET_PICTURES, OTHER_PICTURES = 3, 20, 4
GATES = ("calibrated", "always")
ANCHOR = {"ca": {"surrogate": "icon"}}
"""Concept Ablation needs an anchor concept: every picture of this base is one of an icon."""


def held_out(world: World) -> tuple[str, ...]:
    """Return the other subjects whose names no anchor has."""
    return world.others[::2]


def seen(world: World, adapter: Adapter, target: str, base: dict[str, bool]) -> dict[str, Any]:
    """Return the target's share and the others' changes in points under each gate."""
    found = {}
    asked, others = world.pictures([target], TARGET_PICTURES), world.pictures(world.others, OTHER_PICTURES)
    before = shares(others, [base[key(one)] for one in others])
    for gate in GATES:
        with attach(world.pipe, [adapter], gate=gate, progress=False, force=True) as erasers:
            acted = [one for one in others if any(erasers.gates(one.prompt).values())]
            changed = dict(zip(map(key, acted), readings(world, acted), strict=True))
            right = readings(world, asked)
        after = shares(others, [changed.get(key(one), base[key(one)]) for one in others])
        changes = {subject: 100 * (after[subject] - before[subject]) for subject in after}
        apart = [changes[subject] for subject in held_out(world)]
        worst = min(changes, key=lambda subject: changes[subject])
        found[gate] = {
            "target_found": sum(right) / len(right),
            "others_mean_points": round(mean(list(changes.values())), 2),
            "others_held_out_mean_points": round(mean(apart), 2),
            "others_held_out_worst_points": round(min(apart), 1),
            "others_worst_points": round(changes[worst], 1),
            "others_worst": worst,
        }
    return found


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def trained(world: World, method: str, target: str) -> tuple[Adapter, float]:
    """Return an eraser by a method's preset, and the CPU seconds of its training."""
    begun = time.process_time()
    with anchors_without(held_out(world)):
        recipe = Recipe.plan(target=target, method=method, model="second", **ANCHOR.get(method, {}))
        adapter = train(recipe, pipe=world.pipe)
    return adapter, time.process_time() - begun


def measure(world: World, method: str, target: str, base: dict[str, bool]) -> dict[str, Any]:
    """Train one eraser and judge it."""
    adapter, seconds = trained(world, method, target)
    adapter, look = looked(world.pipe, adapter)
    return {**seen(world, adapter, target, base), "seconds": round(seconds, 1), **said(adapter.manifest, look)}


def of_the_base(world: World, pictures: Sequence[Picture]) -> dict[str, bool]:
    """Return of every picture whether the base draws its subject."""
    return dict(zip(map(key, pictures), readings(world, pictures), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="those not measured yet unless given", metavar="METHOD")
    parser.add_argument("--second", type=Path, required=True, help="the base, made by second_base.py")
    parser.add_argument("--out", default="methods_second", help="name of the result: benchmarks/results/OUT.json")
    parser.add_argument("--said", action="store_true", help="only what `spmhub train` says of an eraser")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    world, file = second(options.second), RESULTS / f"{options.out}.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    targets = world.targets[:CONCEPTS]
    others = world.pictures(world.others, OTHER_PICTURES)
    base = of_the_base(world, others)
    numbers |= {
        "targets": list(targets), "others": len(world.others), "others_held_out": len(held_out(world)),
        "targets_found_by_the_base": mean(readings(world, world.pictures(targets, TARGET_PICTURES))),
        "others_found_by_the_base": mean(list(base.values())), "steps": STEPS,
        "pictures": {"target": TARGET_PICTURES, "other": OTHER_PICTURES},
    }  # fmt: skip
    for method in options.methods or TRAINED:
        for target in targets:
            cells = numbers["cells"].setdefault(method, {})
            if (target not in cells) if options.said else (not options.methods and target in cells):
                continue
            print(f"{method}, {target} ...", file=sys.stderr, flush=True)
            if options.said:
                cells[target] = said_again(cells[target], trained(world, method, target)[0], world.pipe)
            else:
                cells[target] = measure(world, method, target, base)
            record(options.out, numbers, seeds={"training": 0})


if __name__ == "__main__":
    main()
