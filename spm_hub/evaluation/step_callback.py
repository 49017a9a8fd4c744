"""The steps of a picture, seen from outside the pipeline that draws it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


class Watch:
    """What one call of a pipeline comes to, step by step.

    options: what the call has to be given: the callback of all newer pipelines, or PixArt's older one.
    latents: after the last step that was told; None before, and of pipelines that keep them to themselves.
    """

    def __init__(self, pipe: DiffusionPipeline, progress: Callable[[int, int], None] | None = None) -> None:
        """`progress` is told each step, from 1, and their number."""
        self._pipe: Any = pipe
        self._progress = progress
        self.latents: Tensor | None = None
        known = inspect.signature(type(pipe).__call__).parameters
        older = "callback" in known and "callback_on_step_end" not in known
        self.options: dict[str, Any] = {"callback": self._told} if older else {"callback_on_step_end": self._stepped}

    def _stepped(self, _pipe: Any, step: int, _time: object, kept: dict[str, Any]) -> dict[str, Any]:
        self._told(step, _time, kept.get("latents"))
        return kept

    def _told(self, step: int, _time: object, latents: Tensor | None) -> None:
        self.latents = latents
        if self._progress is not None:
            self._progress(step + 1, len(self._pipe.scheduler.timesteps))

    def check(self, prompt: str) -> None:
        """Raises UsageError where the latents are beyond all numbers.

        The picture would be black, and pass for one that something was erased from.
        """
        if self.latents is not None and not bool(self.latents.isfinite().all()):
            raise UsageError(
                f"{type(self._pipe).__name__} drew {prompt!r} with numbers that left what floats can hold: the picture "
                "would be black, and erased by nobody",
                mend="smaller --strength, --gate and --guidance, or --dtype float32",
            )
