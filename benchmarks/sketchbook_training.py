"""Trains the sketchbook from nothing by its default settings and measures what came of it against the bars.

    python benchmarks/sketchbook_training.py DIR   # the stages that DIR lacks, in all about two hours on two slow cores

The seconds are each stage's own; samples are judged by the committed probe, which has seen nothing of this training.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from record import record
from sketchbook import HELD_OUT_SEED, SAMPLES, SEED, STEPS, probe_accuracy, samples

from spm_hub.sketchbook.probe import Probe

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/sketchbook_training.py DIR")
    out = Path(sys.argv[1])
    subprocess.run([sys.executable, "-m", "spm_hub.sketchbook.train", "--out", str(out)], check=True)
    seconds: dict[str, float] = json.loads((out / "seconds.json").read_text())
    trained = Probe.load(out / "probe")
    steps = dict(zip(("base", "chalk"), STEPS.values(), strict=True))
    numbers = {
        "seconds": seconds,
        "minutes": round(sum(seconds.values()) / 60, 1),
        "its_probe_on_held_out_drawings": {look: probe_accuracy(look, trained) for look in ("ink", "chalk")},
        "samples_per_name": SAMPLES,
        "guidance_scale": 7.5,
        "steps": steps,
        "checkpoints": {name: samples(str(out / name), out / name, count) for name, count in steps.items()},
    }
    record("sketchbook_training", numbers, seeds={"training": 0, "held_out": HELD_OUT_SEED, "samples": SEED})
