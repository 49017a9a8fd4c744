"""Draws the batches of a run under every condition, and keeps each as soon as it is drawn."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from spm_hub.errors import RegistryError, UsageError
from spm_hub.evaluation.base_pictures import base_key, kept_or_drawn
from spm_hub.evaluation.pictures import WITHOUT
from spm_hub.evaluation.records.folder import SAMPLES, RunFolder, append_durably
from spm_hub.evaluation.records.rows import Batch
from spm_hub.evaluation.records.sample import Sample
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.io.progress import ProgressCallback
from spm_hub.io.runners.runner import Place, Runner, Say, Serial, Work

Conditions = Mapping[str, Callable[[], AbstractContextManager[Any]]]
"""For each condition a function that attaches its erasers for a `with` block, which has the attachment, or None."""


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


BatchToDraw = tuple[str, int]
"""A condition and the number of a batch: a piece of the work of drawing."""


@dataclass(frozen=True)
class Drawing:
    """The work of drawing, with a pipeline of this process.

    as_loaded: the pipeline is the base as it was loaded, so that its pictures without erasers serve other runs.
    """

    folder: RunFolder
    pipe: DiffusionPipeline
    conditions: Conditions
    defaults: RowDefaults
    as_loaded: bool = False

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[BatchToDraw], str]]:
        """Yield the function that draws a batch, writes its pictures and returns its lines of samples.jsonl.

        Erasers stay attached while batches of one condition follow each other.
        """
        self.pipe.set_progress_bar_config(disable=True)
        now: tuple[str, Any] = ("", None)
        with ExitStack() as attached:

            def draw(piece: BatchToDraw) -> str:
                nonlocal now
                condition, number = piece
                if condition != now[0]:
                    attached.close()
                    now = condition, attached.enter_context(self.conditions[condition]())
                batch = self.folder.batches[number]
                if condition == WITHOUT and self.as_loaded:
                    pictures = self._without_erasers(batch)
                else:
                    pictures = draw_batch(self.pipe, batch, self.defaults)
                gammas = {} if now[1] is None else dict(now[1].last_gammas)
                samples = self.folder.keep(condition, batch, pictures, gammas)
                return "".join(sample.to_line() for sample in samples)

            yield draw

    @cached_property
    def _base_key(self) -> str | None:
        return base_key(self.pipe)

    def _without_erasers(self, batch: Batch) -> list[Image.Image]:
        """Return the base's own pictures of a batch, from an earlier run if it drew the same batch."""
        rows = [(row.prompt, row.seed, row.negative, row.guidance, row.width, row.height) for row in batch.rows]
        how = [astuple(self.defaults), rows]
        return kept_or_drawn(self._base_key, how, len(rows), lambda: draw_batch(self.pipe, batch, self.defaults))


def draw_missing(
    folder: RunFolder,
    work: Work,
    runner: Runner | None = None,
    progress: ProgressCallback = lambda done, total: None,
    say: Say = lambda text: None,
) -> None:
    """Draw every batch that the folder does not have whole, one condition after the other.

    work: does pieces as `Drawing` does. runner: None for this process. progress: called with the pictures that exist
    and their total.
    Raises UsageError if the pipeline refuses the settings or its latents overflow; RegistryError.
    """
    kept = folder.samples()
    folder.replace(kept)
    there = {(sample.condition, sample.batch) for sample in kept}
    missing = [
        (condition, batch.number)
        for condition in folder.conditions
        for batch in folder.batches
        if (condition, batch.number) not in there
    ]
    if missing:
        folder.forget_scores()
    total, done = len(folder.rows) * len(folder.conditions), len(kept)
    for number, lines in (runner or Serial()).run(work, missing, say):
        append_durably(folder.path / SAMPLES, lines)
        done += len(folder.batches[missing[number][1]].rows)
        progress(done, total)
    found = folder.samples()
    _check_shared(folder, found)
    folder.replace(found)  # in order, whoever drew them


def _check_shared(folder: RunFolder, samples: Sequence[Sample]) -> None:
    """Refuse pictures that a worker wrote where this process does not see them. Raises RegistryError."""
    if lost := [sample.picture for sample in samples if not (folder.path / sample.picture).is_file()]:
        raise RegistryError(
            f"{folder.path / lost[0]} is not there, although a worker wrote it: the machines see different folders",
            mend="--out with a folder that all machines share under one path",
        )


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
