"""Trains the sketchbook from nothing by its default settings and measures what came of it against the bars.

    python benchmarks/sketchbook_training.py DIR   # the stages that DIR lacks, in all about two hours on two slow cores
    python benchmarks/sketchbook_training.py DIR --measure base --held-still 1400

The seconds are each stage's own; samples are judged by the committed probe, which has seen nothing of this training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from record import record
from sketchbook import HELD_OUT_SEED, SAMPLES, SEED, STEPS, probe_accuracy, samples

from spm_hub.sketchbook.probe import Probe

STEPS_OF = dict(zip(("base", "chalk"), STEPS.values(), strict=True))

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="DIR")
    parser.add_argument("--measure", nargs="*", choices=STEPS_OF, default=list(STEPS_OF), help="of the two checkpoints")
    parser.add_argument("--held-still", type=float, default=0.0, help="seconds for which the training was stopped")
    options = parser.parse_args()
    out: Path = options.out
    subprocess.run([sys.executable, "-m", "spm_hub.sketchbook.train", "--out", str(out)], check=True)
    seconds: dict[str, float] = json.loads((out / "seconds.json").read_text())
    trained = Probe.load(out / "probe")
    numbers = {
        "seconds": seconds,
        "seconds_held_still": options.held_still,
        "minutes": round((sum(seconds.values()) - options.held_still) / 60, 1),
        "its_probe_on_held_out_drawings": {look: probe_accuracy(look, trained) for look in ("ink", "chalk")},
        "samples_per_name": SAMPLES,
        "guidance_scale": 7.5,
        "steps": STEPS_OF,
        "checkpoints": {name: samples(str(out / name), out / name, STEPS_OF[name]) for name in options.measure},
    }
    record("sketchbook_training", numbers, seeds={"training": 0, "held_out": HELD_OUT_SEED, "samples": SEED})
