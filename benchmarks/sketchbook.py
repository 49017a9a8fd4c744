"""The sketchbook's own bars: is the embedded base model good enough to erase from?

    python benchmarks/sketchbook.py            # about five minutes on two cores

Measures the probe on held-out drawings, what it sees in samples of both checkpoints, sizes and the time of four
pictures, and draws the grid of subjects x styles for the README.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from PIL import Image
from record import RESULTS, record

from spm_hub.evaluation.sketchbook import Case, detection_table, noun, paint, probe
from spm_hub.models import ALIASES, load_pipeline
from spm_hub.sketchbook.figures import SUBJECTS
from spm_hub.sketchbook.probe import STYLE_CLASSES, SUBJECT_CLASSES, labels
from spm_hub.sketchbook.world import STYLE_NAMES, drawings

HELD_OUT_SEED = 987_654  # no training used it
SAMPLES = 50


def probe_accuracy(look: str) -> dict[str, float]:
    """Share of held-out drawings whose subject and style the probe names."""
    rows = drawings(2000, torch.Generator().manual_seed(HELD_OUT_SEED), look)
    readings = probe().read([picture for _, picture, _ in rows])
    right = [
        (SUBJECT_CLASSES.index(seen.subject) == subject, STYLE_CLASSES.index(seen.style) == style)
        for seen, (subject, style) in zip(readings, (labels(drawing) for drawing, _, _ in rows), strict=True)
    ]
    return {"subject": sum(s for s, _ in right) / len(right), "style": sum(t for _, t in right) / len(right)}


def samples(model: str) -> dict[str, object]:
    """What the probe sees in a checkpoint's pictures, the checkpoint's size and the time of four pictures."""

    def tell(done: int, total: int) -> None:
        print(f"\r{model} {done}/{total}", end="", file=sys.stderr)

    pipe = load_pipeline(model)
    rows = detection_table(pipe, samples=SAMPLES, progress=tell)
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in ("subject", "style")}
    size = sum(file.stat().st_size for file in Path(str(ALIASES[model].embedded)).rglob("*") if file.is_file())
    begun = time.perf_counter()
    pipe(["a dog"] * 4, num_inference_steps=25, guidance_scale=7.5)
    return {
        **{f"{kind}_mean": sum(row.detected for row in part) / len(part) for kind, part in kinds.items()},
        **{f"{kind}_worst": min((row.detected, row.name) for row in part) for kind, part in kinds.items()},
        "detected": {row.name: row.detected for row in rows},
        "seconds_for_four_pictures": round(time.perf_counter() - begun, 2),
        "megabytes": round(size / 1e6, 2),
    }


def grid(model: str, path: Path) -> None:
    """Subjects across, styles down."""
    pipe = load_pipeline(model)
    wanted = [
        Case("subject", name, noun(name) if style is None else f"{noun(name)} by {style}", 7 + i)
        for style in (None, *STYLE_NAMES)
        for i, name in enumerate(SUBJECTS)
    ]
    sheet = Image.new("RGB", (66 * len(SUBJECTS), 66 * (1 + len(STYLE_NAMES))), "white")
    for index, picture in enumerate(paint(pipe, wanted)):
        sheet.paste(picture, (66 * (index % len(SUBJECTS)), 66 * (index // len(SUBJECTS))))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    numbers = {
        "probe_on_held_out_drawings": {look: probe_accuracy(look) for look in ("ink", "chalk")},
        "samples_per_name": SAMPLES,
        "guidance_scale": 7.5,
        "steps": 25,
        "checkpoints": {model: samples(model) for model in ("sketchbook", "sketchbook-chalk")},
    }
    record("sketchbook", numbers, seeds={"held_out": HELD_OUT_SEED, "samples": 2024})
    grid("sketchbook", RESULTS / "sketchbook.png")
    grid("sketchbook-chalk", RESULTS / "sketchbook-chalk.png")
