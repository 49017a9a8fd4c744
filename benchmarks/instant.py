"""Erasers of method `instant` on the sketchbook: the concept found, the others' change, and the time.

    python benchmarks/instant.py                # everything not measured yet
    python benchmarks/instant.py snoopy         # a concept again
    python benchmarks/instant.py --cost DIR     # time and memory of one concept and of ten

All names that the table judges are taken out of the words that the eraser's other sentences are made of, so that no
sentence that was held names a subject that is judged. Each eraser is judged under its own gate and at gamma 1.

--cost computes erasers, in processes of their own, on the sketchbook and from a folder of Stable Diffusion 1.5's exact
sizes with random weights (U-Net 860 M, CLIP-L's text encoder, float16), which is written to DIR unless it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from record import RESULTS, record
from runtime import UNETS, tokenizer_of_77
from transformers import CLIPTextConfig, CLIPTextModel

import spm_hub
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


def kept(name: str = "instant", part: str = "cells") -> dict[str, Any]:
    """What has been measured so far."""
    file = RESULTS / f"{name}.json"
    numbers: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {part: {}}
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


TEN = (*CONCEPTS, "pikachu", "hello kitty", "r2d2", "monet", "golden gate bridge")


def write_sd15(folder: Path) -> None:
    """A diffusers folder of Stable Diffusion 1.5's sizes, random weights in float16."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of_77()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    encoder = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=77, projection_dim=768, **ids,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512,
        ),
        text_encoder=CLIPTextModel(encoder), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, **UNETS["sd1"]), scheduler=DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.to(dtype=torch.float16).save_pretrained(folder)


def computed(model: str, number: int) -> dict[str, float]:
    """Compute erasers in this process; its time without start-up, and the most memory that it ever held."""
    begun, clock = time.process_time(), time.perf_counter()
    made = spm_hub.train(TEN[:number], model=model, method="instant", device="cpu", progress=False)
    assert len(made) == number
    return {
        "cpu_seconds": round(time.process_time() - begun, 1), "seconds": round(time.perf_counter() - clock, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip


def cost(folder: Path) -> None:
    """Time and memory of one concept and of ten."""
    if not folder.exists():
        write_sd15(folder)
    for name, model in {"sketchbook": "sketchbook", "sd15": str(folder)}.items():
        for number in (1, 10):
            numbers = kept("instant_cost", "bases")
            if str(number) in numbers["bases"].get(name, {}):
                continue
            command = [sys.executable, __file__, "--computed", model, str(number)]
            seen = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "TQDM_DISABLE": "1"})
            numbers["bases"].setdefault(name, {})[str(number)] = json.loads(seen.stdout)
            print(name, number, numbers["bases"][name][str(number)], file=sys.stderr, flush=True)
            record("instant_cost", numbers, seeds=0)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("concepts", nargs="*", help="concepts; all that are not measured yet unless given")
    parser.add_argument("--cost", type=Path, metavar="DIR", help="measure time and memory, with SD1.5's sizes in DIR")
    parser.add_argument("--computed", nargs=2, metavar=("MODEL", "COUNT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.computed:
        print(json.dumps(computed(given.computed[0], int(given.computed[1]))))
    elif given.cost:
        cost(given.cost)
    else:
        for one in given.concepts or [name for name in CONCEPTS if name not in kept()["cells"]]:
            measure(one)


if __name__ == "__main__":
    main()
