"""On which pictures do the shipped erasers act under the evidence gate?

    python benchmarks/evidence.py    # ten minutes on one core

For each eraser and both of the sketchbook's checkpoints: in which share of pictures for other subjects and styles
the gate finds the concept, in how many of these the probe sees it too, and the greatest evidence in the others.
The prompts are those of `spmhub eval`, on which no eraser was trained. What attacks find under the gate is in
benchmarks/attacks.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from record import RESULTS, record

import spm_hub
from spm_hub.attachment.gates.evidence import LEAST_SHARE, LEAST_SHOWN, LEAST_TRACE, SURE_SHARE, Evidence
from spm_hub.evaluation.judging import probe_judge
from spm_hub.evaluation.sketchbook import DetectionCase, cases

ERASERS = ("snoopy", "van-gogh", "nudity", "mickey", "spongebob")
CHECKPOINTS = ("sketchbook", "sketchbook-chalk")
SAMPLES, SEED, BATCH, STEPS, GUIDANCE = 10, 2024, 45, 12, 7.5


def measure(checkpoint: str, name: str) -> dict[str, Any]:
    """Return what the gate finds in pictures that are none of an eraser's concept."""
    pipe = spm_hub.load_pipeline(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    eraser = spm_hub.load(name, registry=RESULTS.parents[1])
    concept, judge = eraser.manifest.concept, probe_judge(eraser.manifest.concept)
    asked = [
        case for case in cases(samples=SAMPLES, seed=SEED) if not any(each in case.prompt for each in concept.names)
    ]
    parts = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]

    def drawn(part: Sequence[DetectionCase]) -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(case.seed) for case in part]
        pictures: list[Image.Image] = pipe(
            [case.prompt for case in part], generator=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE
        ).images
        return pictures

    shown = [seen for part in parts for seen in judge(drawn(part))]
    found: list[Evidence] = []
    with spm_hub.attach(pipe, [eraser], gate="evidence", progress=False) as erasers:
        for part in parts:
            drawn(part)
            found += erasers.last_evidence[name]
    acting = [place for place, one in enumerate(found) if one.gamma >= 1]
    still = [one for one, seen in zip(found, shown, strict=True) if one.gamma < 1 and not seen]
    return {
        "pictures_of_others": len(asked), "acting": round(len(acting) / len(asked), 4),
        "acting_on": dict(sorted(Counter(asked[place].name for place in acting).items())),
        "the_probe_sees_the_concept_in": sum(shown[place] for place in acting),
        "left_although_the_probe_sees_it": sum(seen and one.gamma < 1 for one, seen in zip(found, shown, strict=True)),
        "greatest_share_of_others": round(max(one.share for one in still), 4),
        "greatest_shown_of_others": round(max(one.shown for one in still if one.shown is not None), 4),
    }  # fmt: skip


if __name__ == "__main__":
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in CHECKPOINTS:
        for name in ERASERS:
            found.setdefault(checkpoint, {})[name] = measure(checkpoint, name)
            print(checkpoint, name, found[checkpoint][name], file=sys.stderr, flush=True)
    bars = {"share": LEAST_SHARE, "shown": LEAST_SHOWN, "trace": LEAST_TRACE, "sure": SURE_SHARE}
    record("evidence", {"bars": bars, "samples_per_name": SAMPLES, "checkpoints": found}, seeds=SEED)
