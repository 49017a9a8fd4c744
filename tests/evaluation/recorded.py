"""A small run on the pico pipeline: two prompts of the concept, three others, with and without an eraser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from pico import pico_eraser, pico_pipeline

from spm_hub.adapters.adapter import Adapter
from spm_hub.attachment.attachment import attach
from spm_hub.evaluation.metrics.metric import Judge, Metric, Verdict
from spm_hub.evaluation.metrics.named import distances, metric_named
from spm_hub.evaluation.records.drawing import Drawing, RowDefaults, draw_missing
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.rows import PromptRow
from spm_hub.evaluation.records.scoring import score
from spm_hub.evaluation.reports.writing import write_reports
from spm_hub.io.progress import Bars

QUIET = Bars(shown=False)
ROWS = (
    PromptRow("0", "a photo of snoopy", 1, "snoopy"),
    PromptRow("1", "snoopy on the beach", 2, "snoopy"),
    PromptRow("2", "a photo of a dog", 3, "dog", "neighbour"),
    PromptRow("3", "a dog", 4, "dog", "neighbour", guidance=2.0),
    PromptRow("4", "a red church", 2**63, "church", "unrelated", negative="blue"),
)
RUN: dict[str, Any] = {
    "protocol": {"name": "test", "version": 1, "sha256": "0" * 64, "about": "A test.", "paper": None, "base": None,
                 "differs": ["small"]},
    "published": [], "model": "pico", "erasers": [{"name": "snoopy"}], "conditions": ["without", "with"], "at_once": 2,
    "drawing": {"steps": 2, "guidance": 3.0}, "seed": 0, "quick": False, "limit": None, "all_rows": 5, "prompts": None,
    "stand_in_for": None, "versions": {"torch": "2"},
}  # fmt: skip
DEFAULTS = RowDefaults(steps=2, guidance=3.0)


def contents(path: Path) -> dict[str, str]:
    """The hash of every file that a run leaves, but its lock."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def bright(pictures: Sequence[Any], subjects: Sequence[str]) -> list[Verdict]:
    """Present where the picture's mean is above the mean of random pictures of this pipeline."""
    means = [float(np.asarray(picture).mean()) for picture in pictures]
    return [Verdict(mean > 120, mean) for mean in means]


def metrics() -> list[Metric]:
    return [Judge("bright", bright, {"above": 120}), metric_named("ssim"), metric_named("frechet:probe")]


def evaluate(
    path: Path,
    *,
    rows: Sequence[PromptRow] = ROWS,
    eraser: Adapter | None = None,
    resume: bool = False,
    measured: Sequence[Metric] | None = None,
    gate: Any = "always",
) -> dict[str, Any]:
    """Draw, measure and report; the report as it was written."""
    pipe = pico_pipeline()
    eraser = pico_eraser(pipe.unet) if eraser is None else eraser
    folder = RunFolder.start(path, RUN, rows, resume=resume)
    conditions = {"without": nullcontext, "with": lambda: attach(pipe, [eraser], gate=gate)}
    with folder.locked():
        draw_missing(folder, Drawing(folder, pipe, conditions, DEFAULTS))
        score(folder, metrics() if measured is None else measured, QUIET)
        write_reports(folder, distances())
    written: dict[str, Any] = json.loads((path / "report.json").read_text())
    return written
