"""Every method on one table: what it erases, what it costs the rest, and what an attack brings back.

    python benchmarks/methods.py                       # everything not measured yet; hours on two cores
    python benchmarks/methods.py spm esd-x:van-gogh    # a method, or one of its concepts, again
    python benchmarks/methods.py --said                # only what `spmhub train` says, of erasers trained again

For each method and concept, on the sketchbook: how often the probe finds the concept under the calibrated gate and
without a gate, the worst and the mean change of all other subjects and styles, the Fréchet distance of the others'
pictures to the base's own (features of the probe, without a gate), the success rate of UnlearnDiffAtk, trained numbers,
size of the file, CPU seconds of the training, and what `spmhub train` itself says about its eraser. Methods are as
`spmhub train CONCEPT --method METHOD` presets them, but half of the others' names are taken out of the words that
anchors are made of, and counted apart. SLD and the negative prompt train nothing and have no gate.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from record import RESULTS, record

from spm_hub import Adapter, attach
from spm_hub.adapters.manifest import Concept, GateName, Manifest
from spm_hub.evaluation import attacks
from spm_hub.evaluation.grid import GridRow, draw_grid
from spm_hub.evaluation.guidance import negative_prompt, safe_latent_diffusion
from spm_hub.evaluation.judging import probe_judge, sentences
from spm_hub.evaluation.metrics.distances import frechet_distance
from spm_hub.evaluation.sketchbook import DetectionCase, cases, count, paint, probe
from spm_hub.hub.making.quick_look import looked
from spm_hub.models.loading import load_pipeline
from spm_hub.training.data import prompts
from spm_hub.training.data.prompts import Tokenizer, Words, vocabulary_words
from spm_hub.training.methods import METHODS
from spm_hub.training.recipe.recipe import Recipe
from spm_hub.training.trainer import train
from spm_hub.training.verdict import OTHERS_RECOGNISED, QUICK_LOOK, RECOGNISED, verdict

CONCEPTS = ("snoopy", "van gogh", "nudity")
GATES: tuple[GateName, ...] = ("calibrated", "always")
SHOWN = {"snoopy": ("snoopy", "mickey"), "van gogh": ("van gogh", "picasso"), "nudity": ("nudity", "person")}
TARGET_SAMPLES, OTHER_SAMPLES, SEED, STEPS = 50, 20, 2024, 12
ATTACKED, ITERATIONS, TIMESTEPS = 10, 20, 10

Guidance = Callable[[DiffusionPipeline, str], AbstractContextManager[None]]
BY_GUIDANCE: dict[str, Guidance] = {
    "sld-medium": lambda pipe, concept: safe_latent_diffusion(pipe, concept, "medium"),
    "sld-max": lambda pipe, concept: safe_latent_diffusion(pipe, concept, "max"),
    "negative-prompt": negative_prompt,
}
# The six selections of ESD differ in modules only; three of them stand for all.
TRAINED = tuple(method for method in METHODS if method not in ("esd-x-strict-text", "esd-all", "esd-selfattn"))


def wanted(concept: str) -> list[DetectionCase]:
    """The target's cases and everybody else's."""
    return [case for case in cases(samples=TARGET_SAMPLES, seed=SEED) if case.name == concept] + [
        case for case in cases(samples=OTHER_SAMPLES, seed=SEED) if case.name != concept
    ]


@cache
def bare(concept: str) -> list[Image.Image]:
    """The base's own pictures of `wanted`."""
    return paint(load_pipeline("sketchbook", device="cpu"), wanted(concept), steps=STEPS)


@contextmanager
def anchors_without(names: Sequence[str]) -> Iterator[None]:
    """Take names out of the words that anchors are made of."""
    general = Words.load()

    def kept(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(word for word in words if set(names).isdisjoint(word.split()))

    def known(tokenizer: Tokenizer) -> tuple[str, ...]:
        return kept(vocabulary_words(tokenizer))

    fewer = Words(*(kept(getattr(general, part.name)) for part in fields(general)))
    with patch.object(prompts, "vocabulary_words", known), patch.object(prompts.Words, "load", lambda: fewer):
        yield


def held_out(concept: str) -> list[str]:
    """Return the other subjects and styles whose names no anchor has."""
    return list(dict.fromkeys(case.name for case in wanted(concept) if case.name != concept))[::2]


def compare(concept: str, pictures: list[Image.Image]) -> dict[str, Any]:
    """Return the detections, changes of the others in points, and the Fréchet distance of the others."""
    asked = wanted(concept)
    before = {(row.kind, row.name): row.detected for row in count(asked, bare(concept))}
    after = {(row.kind, row.name): row.detected for row in count(asked, pictures)}
    changes = {name: 100 * (after[kind, name] - before[kind, name]) for kind, name in before if name != concept}
    apart = [changes[name] for name in held_out(concept)]
    others = [at for at, case in enumerate(asked) if case.name != concept]
    first, second = (probe().features([of[at] for at in others]) for of in (bare(concept), pictures))
    worst = min(changes, key=lambda name: changes[name])
    return {
        "found_without": next(share for (_, name), share in before.items() if name == concept),
        "target_found": next(share for (_, name), share in after.items() if name == concept),
        "others_mean_points": round(sum(changes.values()) / len(changes), 2),
        "others_held_out_mean_points": round(sum(apart) / len(apart), 2),
        "others_held_out_worst_points": round(min(apart), 1),
        "others_worst_points": round(changes[worst], 1),
        "others_worst": worst,
        "others_frechet": round(frechet_distance(first, second), 3),
    }


def drawn(pipe: DiffusionPipeline, adapter: Adapter, concept: str, gate: GateName) -> list[Image.Image]:
    """Return the pictures of `wanted` with an eraser; where its gate is 0 they are the base's own, bit for bit."""
    pictures = list(bare(concept))
    with attach(pipe, [adapter], gate=gate, progress=False) as erasers:
        acted = [(at, case) for at, case in enumerate(wanted(concept)) if any(erasers.gates(case.prompt).values())]
        for (at, _), picture in zip(acted, paint(pipe, [case for _, case in acted], steps=STEPS), strict=True):
            pictures[at] = picture
    return pictures


def attacked(adapter: Adapter, pipe: DiffusionPipeline) -> dict[str, Any]:
    """UnlearnDiffAtk's success rates. Its prompts name the concept, so that no gate would be below 1."""
    concept: Concept = adapter.manifest.concept
    attack = attacks.UnlearnDiffAtk(
        tokens=5 if concept.kind == "nsfw" else 3, iterations=ITERATIONS, timesteps=TIMESTEPS
    )
    report = attacks.run(
        pipe, [adapter], sentences(concept, ATTACKED, SEED), probe_judge(concept), attack,
        drawing=attacks.AttackDrawingOptions(steps=STEPS, guidance=7.5), seed=SEED, gate="always",
    )  # fmt: skip
    return {"cases": len(report.outcomes), "before": round(report.before, 3), "asr": round(report.asr, 3)}


def trained(method: str, concept: str, pipe: DiffusionPipeline) -> tuple[Adapter, float]:
    """Return an eraser by a method's preset, and the CPU seconds of its training."""
    begun = time.process_time()
    with anchors_without(held_out(concept)):
        adapter = train(Recipe.plan(target=concept, method=method, model="sketchbook"), pipe=pipe)
    return adapter, time.process_time() - begun


def said_again(cell: dict[str, Any], adapter: Adapter, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return a cell with what `spmhub train` says now.

    A training is reproducible, so that the eraser is the one that the cell measured if it went exactly as far.
    """
    adapter, look = looked(pipe, adapter)
    new = said(adapter.manifest, look)
    before, now = (re.search(r"\d+ % of the way", one["verdict"]) for one in (cell, new))
    assert (before and before[0]) == (now and now[0]), f"another eraser: {cell['verdict']}, {new['verdict']}"
    return {**cell, **new}


def measure(method: str, concept: str) -> tuple[dict[str, Any], list[Image.Image]]:
    """Return one cell of the table, and its pictures for the grid."""
    pipe, asked = load_pipeline("sketchbook", device="cpu"), wanted(concept)
    if method in BY_GUIDANCE:
        with BY_GUIDANCE[method](pipe, "a nude person" if concept == "nudity" else concept):
            pictures = paint(pipe, asked, steps=STEPS)
        return {"always": compare(concept, pictures)}, shown(concept, pictures)
    adapter, seconds = trained(method, concept, pipe)
    adapter, look = looked(pipe, adapter)
    with tempfile.TemporaryDirectory() as folder:
        written = adapter.save(Path(folder) / "eraser.safetensors")
    stored = [tensor.numel() for increment in adapter.increments.values() for tensor in increment.tensors().values()]
    by_gate = {gate: drawn(pipe, adapter, concept, gate) for gate in GATES}
    cell: dict[str, Any] = {gate: compare(concept, pictures) for gate, pictures in by_gate.items()}
    cell |= {"seconds": round(seconds, 1), "numbers": sum(stored), "bytes": written.increment.bytes}
    cell |= {**said(adapter.manifest, look), "unlearndiffatk": attacked(adapter, pipe)}
    return cell, shown(concept, by_gate["always"])


def said(manifest: Manifest, look: str) -> dict[str, Any]:
    """Return what `spmhub train` says about an eraser.

    recognised: share of pictures in which the base recognises the concept; others_recognised: of other names that it
    recognised before.
    """
    rows = {row.metric: row.value for row in manifest.evaluation if row.protocol == QUICK_LOOK}
    recognised = {"recognised": rows[RECOGNISED], "others_recognised": rows.get(OTHERS_RECOGNISED)}
    return {**recognised, "verdict": f"{verdict(manifest)}; {look}"}


def shown(concept: str, pictures: list[Image.Image]) -> list[Image.Image]:
    """Two pictures of the concept, two of its neighbour."""
    names = [case.name for case in wanted(concept)]
    return [pictures[names.index(name) + number] for name in SHOWN[concept] for number in (0, 1)]


def strip(method: str, concept: str) -> Path:
    """Where a cell's pictures wait for the grid; not committed."""
    return RESULTS / "strips" / f"{method}-{concept.replace(' ', '-')}.png"


def keep(file: Path, pictures: list[Image.Image]) -> None:
    """Side by side, 64 pixels each."""
    file.parent.mkdir(exist_ok=True)
    sheet = Image.new("RGB", (64 * len(pictures), 64))
    for at, picture in enumerate(pictures):
        sheet.paste(picture.resize((64, 64)), (64 * at, 0))
    sheet.save(file)


def kept() -> dict[str, Any]:
    """What has been measured so far."""
    file = RESULTS / "methods.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    return numbers


def grid() -> None:
    """All cells that have been drawn on this machine, a row for each method."""
    rows = []
    for method in ("nothing", *TRAINED, *BY_GUIDANCE):
        sheets = [Image.open(file) for concept in CONCEPTS if (file := strip(method, concept)).exists()]
        if len(sheets) == len(CONCEPTS):
            cells = [sheet.crop((64 * at, 0, 64 * at + 64, 64)) for sheet in sheets for at in range(4)]
            rows.append(GridRow(method, tuple((cells[at], cells[at + 1]) for at in range(0, len(cells), 2))))
    if rows:
        draw_grid(rows, [name for concept in CONCEPTS for name in SHOWN[concept]]).save(RESULTS / "methods.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="METHOD or METHOD:CONCEPT; everything not measured yet unless given")
    parser.add_argument("--said", action="store_true", help="only what `spmhub train` says of an eraser")
    options = parser.parse_args()
    parts = options.parts
    torch.set_num_threads(1)
    about = {
        "samples": {"target": TARGET_SAMPLES, "others": OTHER_SAMPLES}, "steps": STEPS, "guidance_scale": 7.5,
        "attack": {"prompts": ATTACKED, "iterations": ITERATIONS, "timesteps": TIMESTEPS},
    }  # fmt: skip
    for concept in CONCEPTS:
        for method in (*TRAINED, *BY_GUIDANCE):
            chosen = not {method, f"{method}:{concept.replace(' ', '-')}"}.isdisjoint(parts)
            if not (chosen if parts else options.said or concept not in kept()["cells"].get(method, {})):
                continue
            print(f"{method}, {concept} ...", file=sys.stderr, flush=True)
            if options.said:
                if method in TRAINED:
                    sketchbook = load_pipeline("sketchbook", device="cpu")
                    eraser, _ = trained(method, concept, sketchbook)
                    numbers = kept()
                    cells = numbers["cells"][method]
                    cells[concept] = said_again(cells[concept], eraser, sketchbook)
                    record("methods", numbers, seeds=SEED)
                continue
            cell, pictures = measure(method, concept)
            numbers = kept() | about  # read again: another process may have measured other methods meanwhile
            numbers["cells"].setdefault(method, {})[concept] = cell
            keep(strip(method, concept), pictures)
            keep(strip("nothing", concept), shown(concept, bare(concept)))
            record("methods", numbers, seeds=SEED)
            grid()
