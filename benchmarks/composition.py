"""Measure 1 to 100 erasers at once on two bases: what they do to their targets, and to everything else.

    python benchmarks/composition.py train second --second FOLDER --work WORK
    python benchmarks/composition.py train sketchbook --work WORK
    python benchmarks/composition.py measure --second FOLDER --work WORK

`record` instead of `measure` writes the cells that there are. The other base's stay as they were, and so do cells of
gates and numbers of erasers that this run leaves out.
FOLDER is the second base, benchmarks/bases/fluent/base, made by benchmarks/second_base.py. `train` keeps the erasers
in WORK; both commands can be interrupted and go on where they were. Every picture has the same noise with and without
erasers. A picture for whose prompt all gammas are 0 is not drawn again: it is the base's, which is verified on a
sample, bit for bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from record import RESULTS, record
from second_base import Classifier
from worlds import WORLDS
from worlds import phrase as phrase_of

import spm_hub
from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.manifest import slug
from spm_hub.errors import NotFoundError
from spm_hub.evaluation.sketchbook import noun, probe
from spm_hub.registry.registry import Registry
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.world import STYLE_NAMES

ROOT = Path(__file__).parents[1]
COUNTS = (1, 2, 5, 10, 20, 50, 100)
GATES = ("calibrated", "transport", "always", "evidence")
QUIET = ("calibrated", "evidence")
"""Gates that leave most pictures alone: more of them are drawn."""
SECOND = "fluent"
"""The world of the second base."""
SEED, STEPS, BATCH = 20, 12, 32
GUIDANCE = {"second": 3.0, "sketchbook": 7.5}
NOISE = 7000
FIRST = 10
"""So many erasers of the second base are trained by the defaults; the others, and the sketchbook's, by `CHEAP`."""
CHEAP: dict[str, Any] = {"method": "instant"}
DRAWN = 0.85
"""A subject that the base draws less often is neither among the others nor judged as a target."""
OTHERS = 40
SHIPPED = ("snoopy", "van-gogh", "nudity", "mickey", "spongebob")
SKETCHBOOK_TARGETS = ("church", "parachute", "tench", "golf ball", "french horn")
TEMPLATES = {
    "second": ("an icon of {}", "look at {} on grey", "{} against a pink wall", "a stamp that shows {}, on the left"),
    "sketchbook": (
        "an illustration of {}", "a sketch of {} on a purple background", "there is {} at the beach",
        "art of {} on a snowy day",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A picture to draw: its subject, prompt and the seed of its noise."""

    subject: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class World:
    """A base and what is asked of it.

    read: names what is in each of uint8 pictures (n, h, w, 3).  others: subjects that no eraser is for.
    targets: what the erasers are for, in the order in which they are added.  judged: the targets that the base draws.
    """

    name: str
    pipe: Any
    read: Callable[[np.ndarray], list[tuple[str, ...]]]
    phrase: Callable[[str], str]
    others: tuple[str, ...]
    targets: tuple[str, ...]
    judged: frozenset[str]

    def pictures(self, subjects: Sequence[str], each: int) -> list[Picture]:
        """Return `each` pictures of every subject, in the templates in turn; few start with other templates."""
        templates = TEMPLATES[self.name]
        few = each < len(templates)
        return [
            Picture(subject, templates[index % len(templates)].format(self.phrase(subject)), NOISE + index)
            for position, subject in enumerate(subjects)
            for index in range(few * position % len(templates), few * position % len(templates) + each)
        ]


def second(folder: Path) -> World:
    """Return the second base, with others and targets chosen at random among the subjects that it draws."""
    drawn = json.loads((folder.parent / "drawn.json").read_text())
    classifier = Classifier.load(folder.parent / "judge")
    order = list(drawn)
    random.Random(SEED).shuffle(order)
    right = [subject for subject in order if drawn[subject] >= DRAWN]
    wrong = [subject for subject in order if subject not in right]
    first, others, rest = right[:FIRST], right[FIRST : FIRST + OTHERS], right[FIRST + OTHERS :]

    def read(pictures: np.ndarray) -> list[tuple[str, ...]]:
        return [(name,) for name in classifier.names(pictures)]

    return World(
        "second", spm_hub.load_pipeline(str(folder)), read, phrase_of, tuple(others),
        tuple([*first, *rest, *wrong][: max(COUNTS)]), frozenset(right),
    )  # fmt: skip


def sketchbook() -> World:
    """Return the sketchbook; targets beyond those that it can draw are words that it does not know."""
    named = [name.replace("-", " ") for name in SHIPPED]
    targets = (*named, *SKETCHBOOK_TARGETS)
    unknown = [word for word in WORLDS[SECOND].subjects if word not in SUBJECTS]
    random.Random(SEED).shuffle(unknown)

    def read(pictures: np.ndarray) -> list[tuple[str, ...]]:
        found = probe().read([Image.fromarray(picture) for picture in pictures])
        return [(one.subject, one.style) for one in found]

    def phrase(target: str) -> str:
        return f"a tree by {target}" if target in STYLE_NAMES else noun(target)

    return World(
        "sketchbook", spm_hub.load_pipeline("sketchbook"), read, phrase,
        tuple(subject for subject in SUBJECTS if subject not in targets),
        (*targets, *unknown)[: max(COUNTS)], frozenset(targets),
    )  # fmt: skip


def registry_of(world: World, work: Path) -> Registry:
    return Registry(work / f"erasers-{world.name}")


def train(world: World, work: Path, most: int) -> None:
    """Train the erasers of a world that are not in its registry yet, at most the first `most`."""
    registry = registry_of(world, work)
    for index, target in enumerate(world.targets[:most]):
        if registry.find(slug(target)) is not None:
            continue
        if world.name == "sketchbook" and index < len(SHIPPED):
            registry.add(spm_hub.load(SHIPPED[index], registry=ROOT))
            continue
        how = {} if world.name == "second" and index < FIRST else CHEAP
        print(f"{world.name} {index + 1}/{len(world.targets)} {target}", file=sys.stderr, flush=True)
        spm_hub.train(target, pipe=world.pipe, registry=registry, progress=False, resume=True, **how)


def parts(pictures: Sequence[Picture]) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), BATCH):
        yield pictures[start : start + BATCH]


def draw(world: World, pictures: Sequence[Picture], after: Callable[[], object] = lambda: None) -> np.ndarray:
    """Return one uint8 picture for each, (n, h, w, 3).  after: called after each of the pipeline's calls."""
    pipe, drawn = world.pipe, []
    pipe.set_progress_bar_config(disable=True)
    for part in parts(pictures):
        made = pipe(
            [one.prompt for one in part],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE[world.name],
            generator=[torch.Generator().manual_seed(one.seed) for one in part],
            output_type="np",
        )
        drawn.append(made.images)
        after()
    return (np.concatenate(drawn) * 255).round().astype(np.uint8)


def readings(world: World, pictures: Sequence[Picture], after: Callable[[], object] = lambda: None) -> list[bool]:
    """Return of every picture whether its subject is found.  after: as for `draw`."""
    if not pictures:
        return []
    return [one.subject in seen for seen, one in zip(world.read(draw(world, pictures, after)), pictures, strict=True)]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """Return what `make` returned in this run or in an earlier one."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
    return json.loads(path.read_text())


def shares(pictures: Sequence[Picture], found: Sequence[bool]) -> dict[str, float]:
    """Return the share of pictures in which each subject is found."""
    by_subject: dict[str, list[bool]] = {}
    for one, right in zip(pictures, found, strict=True):
        by_subject.setdefault(one.subject, []).append(right)
    return {subject: sum(each) / len(each) for subject, each in by_subject.items()}


def each_target(gate: str, count: int) -> int:
    """Return how many pictures of every target are drawn, in each template equally often if there are four or more."""
    if gate in QUIET:
        return 20 if count <= 10 else 4
    return 4 if count <= 10 else 2


def each_other(world: World, gate: str) -> int:
    """Return how many pictures of every other subject are drawn; the sketchbook has fewer subjects."""
    if gate in QUIET:
        return 8 if world.name == "second" else 16
    return 2 if world.name == "second" else 8


def cell(world: World, adapters: Sequence[Adapter], gate: str, count: int, base: dict[str, bool]) -> dict[str, Any]:
    """Draw others and targets with the first `count` erasers under a gate."""
    targets = world.targets[:count]
    others = world.pictures(world.others, each_other(world, gate))
    asked = world.pictures([one for one in targets if one in world.judged], each_target(gate, count))
    erasers = spm_hub.attach(world.pipe, adapters[:count], gate=gate, progress=False)
    with erasers:
        gammas = {prompt: erasers.gates(prompt) for prompt in dict.fromkeys(one.prompt for one in [*others, *asked])}
        # What the evidence gate finds is known only when a picture is drawn.
        acted = [one for one in others if gate == "evidence" or any(gammas[one.prompt].values())]
        touched: list[bool] = []

        def see() -> None:
            touched.extend(any(each) for each in zip(*erasers.last_gammas.values(), strict=True))

        changed = dict(zip(map(key, acted), readings(world, acted, see), strict=True))
        found = readings(world, asked)
    before = [base[key(one)] for one in others]
    after = [changed.get(key(one), base[key(one)]) for one in others]
    changes = {
        subject: 100 * (share - shares(others, before)[subject]) for subject, share in shares(others, after).items()
    }
    sums = {prompt: sum(gammas[prompt].values()) for prompt in dict.fromkeys(one.prompt for one in others)}
    of_targets = shares(asked, found)
    return {
        "erasers": count, "targets_judged": len(of_targets), "pictures_of_each_target": each_target(gate, count),
        "pictures_of_each_other": each_other(world, gate),
        "targets_found": round(sum(of_targets.values()) / len(of_targets), 4),
        "worst_target": max(((share, target) for target, share in of_targets.items()), key=lambda one: one[0]),
        "targets_still_found": {target: share for target, share in of_targets.items() if share},
        "others_mean_points": round(sum(changes.values()) / len(changes), 2),
        "others_worst_points": min((round(change, 1), subject) for subject, change in changes.items()),
        "others_changed_points": {subject: round(change, 1) for subject, change in changes.items() if change},
        "pictures_of_others_acted_on": round(sum(touched) / len(others), 4),
        "mean_sum_of_gammas": round(sum(sums.values()) / len(sums), 4),
        "prompts_of_others_with_gammas_0": round(sum(not each for each in sums.values()) / len(sums), 4),
        "acting_on_others": {
            prompt: {name: round(gamma, 3) for name, gamma in gammas[prompt].items() if gamma}
            for prompt in sums if sums[prompt] and gate == GATES[0]
        },
        "least_gamma_of_a_target": min(
            (round(gammas[one.prompt][slug(one.subject)], 3), one.prompt) for one in asked
        ),
    }  # fmt: skip


def key(one: Picture) -> str:
    return f"{one.prompt}|{one.seed}"


def identical(world: World, adapters: Sequence[Adapter], count: int, most: int = 8) -> dict[str, int]:
    """Compare pictures of prompts for which all gammas are 0 with the base's, bit for bit, each drawn alone."""
    with spm_hub.attach(world.pipe, adapters[:count], gate=GATES[0], progress=False) as erasers:
        off = [one for one in world.pictures(world.others, 1) if not any(erasers.gates(one.prompt).values())][:most]
        given = [draw(world, [one]) for one in off]
    same = [bool((draw(world, [one]) == picture).all()) for one, picture in zip(off, given, strict=True)]
    return {"erasers": count, "compared": len(same), "identical": sum(same)}


def measure(world: World, work: Path, counts: Sequence[int], gates: Sequence[str], *, new: bool) -> dict[str, Any]:
    """Measure all cells of a world; a cell that an earlier run measured is read from WORK. Without `new`, only read."""
    registry, place = registry_of(world, work), work / f"cells-{world.name}"
    adapters = []
    for target in world.targets:
        try:
            adapters.append(registry.get(slug(target)).load())
        except NotFoundError:
            break
    others = world.pictures(world.others, each_other(world, GATES[0]))
    base = kept(
        place / "base.json",
        lambda: dict(zip(map(key, others), readings(world, others), strict=True)),
    )
    asked = world.pictures([one for one in world.targets if one in world.judged], 4)
    of_targets = kept(place / "base-targets.json", lambda: shares(asked, readings(world, asked)))
    cells: dict[str, Any] = {}
    for gate in gates:
        for count in (each for each in counts if each <= len(adapters)):
            path = place / f"{gate}-{count}.json"
            if not new and not path.exists():
                continue
            made = partial(cell, world, adapters, gate, count, base)
            cells.setdefault(gate, {})[str(count)] = kept(path, made)
            print(world.name, gate, count, json.dumps(cells[gate][str(count)])[:600], file=sys.stderr, flush=True)
    most = max(each for each in counts if each <= len(adapters))
    return {
        "others": len(world.others),
        "others_found_by_the_base": round(sum(base.values()) / len(base), 4),
        "targets_found_by_the_base": round(sum(of_targets.values()) / len(of_targets), 4),
        "targets": list(world.targets[: len(adapters)]),
        "trained": (
            f"the first {FIRST} by the defaults" if world.name == "second" else f"the {len(SHIPPED)} shipped ones"
        ),
        "drawn_by_the_base": sorted(world.judged),
        "templates": list(TEMPLATES[world.name]),
        "bit_identical": kept(place / f"identical-{most}.json", lambda: identical(world, adapters, most)),
        "cells": cells,
    }


def about_the_second_base(folder: Path) -> dict[str, Any]:
    """Return what identifies the second base: its licence, the hashes of its weights, how well it draws."""
    drawn = json.loads((folder.parent / "drawn.json").read_text())
    return {
        "made_by": "benchmarks/second_base.py",
        "art": f"{WORLDS[SECOND].package} ({WORLDS[SECOND].licence})",
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.safetensors"))
        },
        "classifier": json.loads((folder.parent / "accuracy.json").read_text()),
        "subjects": len(drawn),
        "subjects_drawn": sum(share >= DRAWN for share in drawn.values()),
        "drawn_above": DRAWN,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["train", "measure", "record"])
    parser.add_argument("worlds", nargs="*", help="second, sketchbook; both unless given")
    parser.add_argument("--second", type=Path, help="the second base, made by benchmarks/second_base.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for erasers and measured cells")
    parser.add_argument("--most", type=int, default=max(COUNTS), help="train the first erasers only")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS)
    parser.add_argument("--gates", nargs="*", default=GATES)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    found = {}
    for name in options.worlds or ("second", "sketchbook"):
        world = second(options.second) if name == "second" else sketchbook()
        if options.task == "train":
            train(world, options.work, options.most)
        else:
            found[name] = measure(world, options.work, options.counts, options.gates, new=options.task == "measure")
    if options.task != "train":
        before = json.loads((RESULTS / "composition.json").read_text())
        about = about_the_second_base(options.second) if "second" in found else before["second_base"]
        for name, now in found.items():
            earlier = before["worlds"].get(name, {"targets": [], "cells": {}})
            cells = {
                gate: earlier["cells"].get(gate, {}) | now["cells"].get(gate, {})
                for gate in GATES
                if gate in earlier["cells"] or gate in now["cells"]
            }
            found[name] = (earlier if len(earlier["targets"]) > len(now["targets"]) else now) | {"cells": cells}
        record(
            "composition",
            {
                "second_base": about, "steps": STEPS, "guidance_scale": GUIDANCE, "cheap_training": CHEAP,
                "worlds": before["worlds"] | found,
            },
            seeds={"choice": SEED, "noise": NOISE},
        )  # fmt: skip


if __name__ == "__main__":
    main()
