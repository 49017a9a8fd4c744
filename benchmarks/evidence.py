"""On which pictures do the shipped erasers act under the evidence gate?

    python benchmarks/evidence.py    # some minutes on one core

For each eraser and both of the sketchbook's checkpoints: the share of prompts for other subjects and styles at which
the denoiser's evidence reaches the gate's bar, and the least evidence of prompts for its own concept. The prompts are
those of `spmhub eval`, on which no eraser was trained. What attacks find under the gate is in benchmarks/attacks.py.
"""

from __future__ import annotations

import sys
from typing import Any

from record import RESULTS, record

import spm_hub
from spm_hub.attachment.gates.evidence import LEAST_SHARE
from spm_hub.evaluation.sketchbook import cases

ERASERS = ("snoopy", "van-gogh", "nudity", "mickey", "spongebob")
CHECKPOINTS = ("sketchbook", "sketchbook-chalk")
SAMPLES, SEED, BATCH = 10, 2024, 45


def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """End the picture after its first step, before which the denoiser was asked."""
    pipe._interrupt = True
    return tensors


def measure(checkpoint: str, name: str) -> dict[str, Any]:
    """Return the evidence about an eraser's own prompts and others'."""
    pipe = spm_hub.load_pipeline(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    eraser = spm_hub.load(name, registry=RESULTS.parents[1])
    names = eraser.manifest.concept.names
    prompts = [(case.name, case.prompt) for case in cases(samples=SAMPLES, seed=SEED)]
    shares: dict[str, float] = {}
    with spm_hub.attach(pipe, [eraser], gate="evidence", progress=False) as erasers:
        for start in range(0, len(prompts), BATCH):
            part = [prompt for _, prompt in prompts[start : start + BATCH]]
            pipe(part, num_inference_steps=12, output_type="latent", callback_on_step_end=stop)
            shares |= {
                prompt: one.share for prompt, one in zip(part, erasers.last_evidence.get(name, ()), strict=False)
            }
        gammas = {prompt: erasers.gates(prompt)[name] for _, prompt in prompts}
    own = [shares[prompt] for subject, prompt in prompts if subject in names and prompt in shares]
    others = {
        prompt: (subject, shares[prompt])
        for subject, prompt in prompts
        if gammas[prompt] < 1 and prompt in shares and not any(each in prompt for each in names)
    }
    acting = [subject for subject, share in others.values() if share >= LEAST_SHARE]
    return {
        "prompts_of_others": len(others), "acting": round(len(acting) / len(others), 4),
        "acting_on": {subject: acting.count(subject) for subject in sorted(set(acting))},
        "greatest_share_of_others": round(max(share for _, share in others.values()), 4),
        "least_share_of_its_own": round(min(own), 4) if own else None,
    }  # fmt: skip


if __name__ == "__main__":
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in CHECKPOINTS:
        for name in ERASERS:
            found.setdefault(checkpoint, {})[name] = measure(checkpoint, name)
            print(checkpoint, name, found[checkpoint][name], file=sys.stderr, flush=True)
    record("evidence", {"bar": LEAST_SHARE, "samples_per_name": SAMPLES, "checkpoints": found}, seeds=SEED)
