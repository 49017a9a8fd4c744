"""The sketchbook's own bars: is the embedded base model good enough to erase from?

    python benchmarks/sketchbook.py                # both checkpoints, about ten minutes on two cores
    python benchmarks/sketchbook.py sketchbook     # one of them; the other's numbers stay as they were

Measures the probe on held-out drawings, what it sees in samples of both checkpoints, sizes and the time of four
pictures, and draws the grid of subjects x styles for the README.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from record import RESULTS, record

from spm_hub.evaluation.sketchbook import DetectionCase, detection_table, noun, paint, probe
from spm_hub.models.aliases import ALIASES
from spm_hub.models.loading import load_pipeline
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.probe import STYLE_CLASSES, SUBJECT_CLASSES, Probe, labels
from spm_hub.sketchbook.world import STYLE_NAMES, drawings

FILE = RESULTS / "sketchbook.json"
HELD_OUT_SEED = 987_654  # no training used it
SAMPLES, SEED = 50, 2024
# Twelve suffice for the base; of the cats that chalk draws in so few, a third are no cats yet.
STEPS = {"sketchbook": 12, "sketchbook-chalk": 25}
MODELS = ("sketchbook", "sketchbook-chalk")


def probe_accuracy(look: str, judge: Probe) -> dict[str, float]:
    """Share of held-out drawings whose subject and style the probe names."""
    rows = drawings(2000, torch.Generator().manual_seed(HELD_OUT_SEED), look)
    readings = judge.read([picture for _, picture, _ in rows])
    right = [
        (SUBJECT_CLASSES.index(seen.subject) == subject, STYLE_CLASSES.index(seen.style) == style)
        for seen, (subject, style) in zip(readings, (labels(drawing) for drawing, _, _ in rows), strict=True)
    ]
    return {"subject": sum(s for s, _ in right) / len(right), "style": sum(t for _, t in right) / len(right)}


def samples(model: str, folder: Path, steps: int) -> dict[str, object]:
    """What the committed probe sees in a checkpoint's own pictures.

    benchmarks/erasure.py compares erasers with `detected`.
    """
    pipe = load_pipeline(model, device="cpu", dtype="float32")

    def tell(done: int, total: int) -> None:
        print(f"\r{model} {done}/{total}  ", end="", file=sys.stderr, flush=True)

    rows = detection_table(pipe, samples=SAMPLES, seed=SEED, steps=steps, progress=tell)
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in ("subject", "style")}
    begun = time.perf_counter()
    pipe(["a dog"] * 4, num_inference_steps=25, guidance_scale=7.5)
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {
        **{f"{kind}_mean": sum(row.detected for row in part) / len(part) for kind, part in kinds.items()},
        **{f"{kind}_worst": min((row.detected, row.name) for row in part) for kind, part in kinds.items()},
        "detected": {f"{row.kind} {row.name}": row.detected for row in rows},
        "seconds_for_four_pictures_of_25_steps": round(time.perf_counter() - begun, 2),
        "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 2),
    }


def grid(model: str, path: Path) -> None:
    """Subjects across, styles down."""
    pipe = load_pipeline(model, device="cpu", dtype="float32")
    wanted = [
        DetectionCase("subject", name, noun(name) if style is None else f"{noun(name)} by {style}", 7 + i)
        for style in (None, *STYLE_NAMES)
        for i, name in enumerate(SUBJECTS)
    ]
    sheet = Image.new("RGB", (66 * len(SUBJECTS), 66 * (1 + len(STYLE_NAMES))), "white")
    for index, picture in enumerate(paint(pipe, wanted)):
        sheet.paste(picture, (66 * (index % len(SUBJECTS)), 66 * (index // len(SUBJECTS))))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    models = sys.argv[1:] or list(MODELS)
    earlier = json.loads(FILE.read_text())["checkpoints"] if FILE.exists() else {}
    numbers = {
        "probe_on_held_out_drawings": {look: probe_accuracy(look, probe()) for look in ("ink", "chalk")},
        "samples_per_name": SAMPLES,
        "guidance_scale": 7.5,
        "steps": STEPS,
        "checkpoints": {
            **earlier,
            **{model: samples(model, Path(str(ALIASES[model].embedded)), STEPS[model]) for model in models},
        },
    }
    record("sketchbook", numbers, seeds={"held_out": HELD_OUT_SEED, "samples": SEED})
    for model in models:
        grid(model, RESULTS / f"{model}.png")
