"""Draws the batches of a run under every condition, and keeps each as soon as it is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spm_hub.errors import UsageError
from spm_hub.evaluation.records.folder import RunFolder
from spm_hub.evaluation.records.rows import Batch
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.io.progress import ProgressCallback

Conditions = Mapping[str, Callable[[], AbstractContextManager[Any]]]
"""For each condition a function that attaches its erasers for the duration of a `with` block."""


@dataclass(frozen=True)
class RowDefaults:
    """Settings of all rows that have none of their own.

    guidance, negative, width, height: None for the pipeline's own; sizes in pixels.
    """

    steps: int
    guidance: float | None = None
    negative: str | None = None
    width: int | None = None
    height: int | None = None


def draw_missing(
    folder: RunFolder,
    pipe: DiffusionPipeline,
    conditions: Conditions,
    defaults: RowDefaults,
    progress: ProgressCallback | None = None,
) -> None:
    """Draw every batch that the folder does not have whole, one condition after the other.

    progress: called with the pictures that exist and their total.
    Raises UsageError if the pipeline refuses the settings or its latents overflow; RegistryError.
    """
    pipe.set_progress_bar_config(disable=True)
    kept = folder.samples()
    folder.replace(kept)
    there = {(sample.condition, sample.batch) for sample in kept}
    if len(there) < len(folder.batches) * len(folder.conditions):
        folder.forget_scores()
    total, done = len(folder.rows) * len(folder.conditions), len(kept)
    for condition in folder.conditions:
        missing = [batch for batch in folder.batches if (condition, batch.number) not in there]
        if not missing:
            continue
        with conditions[condition]():
            for batch in missing:
                folder.append(folder.keep(condition, batch, draw_batch(pipe, batch, defaults)))
                done += len(batch.rows)
                if progress is not None:
                    progress(done, total)


def draw_batch(pipe: DiffusionPipeline, batch: Batch, defaults: RowDefaults) -> list[Image.Image]:
    """Draw the pictures of one batch in one call of the pipeline, each from the noise of its row's seed.

    Raises UsageError if the pipeline refuses the settings, or its latents overflow.
    """
    first = batch.rows[0]
    given: dict[str, Any] = {
        "guidance_scale": defaults.guidance if first.guidance is None else first.guidance,
        "width": defaults.width if first.width is None else first.width,
        "height": defaults.height if first.height is None else first.height,
    }
    negatives = [defaults.negative if row.negative is None else row.negative for row in batch.rows]
    if None not in negatives:
        given["negative_prompt"] = negatives
    chosen = {key: value for key, value in given.items() if value is not None}
    unknown = chosen.keys() - inspect.signature(type(pipe).__call__).parameters.keys()
    if unknown:
        raise UsageError(
            f"{type(pipe).__name__} takes no {min(unknown)}, and row {first.id} has {chosen[min(unknown)]!r}",
            mend=f"prompt rows without {min(unknown)}, or another protocol: spmhub protocols",
        )
    callback = StepCallback(pipe)
    try:
        made = pipe(
            prompt=[row.prompt for row in batch.rows],
            num_inference_steps=defaults.steps,
            generator=[torch.Generator("cpu").manual_seed(row.seed) for row in batch.rows],
            **callback.options,
            **chosen,
        )
    except ValueError as error:
        raise UsageError(f"{type(pipe).__name__} cannot draw row {first.id}: {str(error).strip()}") from error
    callback.check(first.prompt)
    return list(made.images)
