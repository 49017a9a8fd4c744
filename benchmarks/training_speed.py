"""How long until a concept is gone and the rest intact?

Our training against the paper's own loop, on the same base and the same machine.

    python benchmarks/training_speed.py          # about an hour on two cores

Both erase `snoopy` from the sketchbook with the same rank-1 layers on the same modules. Ours: the defaults. The
paper's: x_t sampled by the student under guidance 3 on a 30-step schedule, batch 1, four anchors, AdamW at 1e-4 with
cosine restarts (warm-up 500, three cycles), lambda 1000, the bare name as prompt, 3,000 iterations (arXiv 2312.16145,
section 4). The clock runs during training steps only. At fixed steps it stops and pictures are judged by the probe:
the first moment at which the target is found in at most 5 % and the others have lost at most 2 points on average is the
time that counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from record import record

from spm_hub import attach
from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.manifest import Base, Concept, Manifest
from spm_hub.evaluation.sketchbook import DetectionRow, detection_table
from spm_hub.models.loading import load_pipeline
from spm_hub.training import Recipe, train
from spm_hub.training.trainable.low_rank import TrainableLowRank

OTHERS = ("mickey", "spongebob", "pikachu", "dog", "cat", "legislator", "church", "golf ball", "person", "apple")
OURS_AT = (40, 50, 60, 70, 80, 100, 120, 140, 160)
PAPER_AT = tuple(range(250, 3001, 250))


def paper(target: str) -> Recipe:
    """The paper's own loop and settings."""
    return Recipe.make(
        target=target,
        steps=3000,
        batch_size=1,
        templates=False,
        x_t={"source": "student", "steps": 30, "guidance": [3.0]},
        anchoring={"weight": 1000.0, "reach": None, "alpha": 1.0, "per_target": 4},
        optimiser={
            "lr": 1e-4, "schedule": "cosine_restarts", "warmup": 500, "cycles": 3, "weight_decay": 0.01,
            "scale_lr": False,
        },
    )  # fmt: skip


def table(target: str, adapter: Adapter | None, samples: int) -> dict[str, float]:
    pipe = load_pipeline("sketchbook", device="cpu")
    wanted: dict[str, Any] = {"subjects": (target, *OTHERS), "styles": (), "samples": samples, "seed": 77, "steps": 12}
    if adapter is None:
        rows: list[DetectionRow] = detection_table(pipe, **wanted)
    else:
        with attach(pipe, [adapter]):
            rows = detection_table(pipe, **wanted)
    return {row.name: row.detected for row in rows}


def run(
    label: str, plan: Recipe, at: tuple[int, ...], bare: dict[str, float], samples: int, give_up: float = float("inf")
) -> dict[str, Any]:
    """Trains until the criterion holds, the recipe ends or `give_up` seconds are spent; every look is recorded."""
    pipe = load_pipeline("sketchbook", device="cpu")
    looks: list[dict[str, Any]] = []
    clock = {"spent": 0.0, "since": time.perf_counter()}

    def look(step: int, injection: TrainableLowRank) -> bool:
        spent = clock["spent"] + time.perf_counter() - clock["since"]
        if step not in at and spent < give_up:
            return False
        clock["spent"] = spent
        increments = injection.increments()
        manifest = Manifest(
            name="now", concept=Concept(target=plan.target), increment=increment_info(increments),
            base=Base(family="sd1", id="sketchbook", fingerprint=""), recipe={},
        )  # fmt: skip
        seen = table(plan.target, Adapter(manifest, increments), samples)
        lost = 100 * sum(bare[name] - seen[name] for name in OTHERS) / len(OTHERS)
        reached = seen[plan.target] <= 0.05 and lost <= 2.0
        spent, found = round(clock["spent"], 1), seen[plan.target]
        looks.append({"step": step, "seconds": spent, "target": found, "others_lost_points": round(lost, 2)})
        print(label, looks[-1], "reached" if reached else "", file=sys.stderr, flush=True)
        clock["since"] = time.perf_counter()
        return reached or spent >= give_up

    train(plan, pipe=pipe, on_step=look)
    last = looks[-1]
    reached = last["target"] <= 0.05 and last["others_lost_points"] <= 2.0
    return {"recipe": plan.model_dump(mode="json"), "looks": looks, "reached": reached, "seconds": last["seconds"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="snoopy")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--give-up", type=float, default=12.0, help="stop the paper's loop at so many times our time")
    options = parser.parse_args()
    bare = table(options.target, None, options.samples)
    ours = run("ours", Recipe.plan(target=options.target), OURS_AT, bare, options.samples)
    limit = options.give_up * ours["seconds"]
    theirs = run("paper", paper(options.target), PAPER_AT, bare, options.samples, limit)
    numbers = {
        "target": options.target,
        "samples_per_name": options.samples,
        "criterion": "target detected in <= 5 %, others lose <= 2 points on average",
        "bare": bare,
        "ours": ours,
        "paper": theirs,
        "times_faster": round(theirs["seconds"] / ours["seconds"], 1),
        "times_faster_is_a_lower_bound": not theirs["reached"],
    }
    record("training_speed", numbers, seeds={"training": 0, "pictures": 77})
