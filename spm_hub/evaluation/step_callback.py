"""Follows the denoising steps of a pipeline call, for progress bars and to detect overflow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spm_hub.errors import UsageError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor


class StepCallback:
    """Callback for one call of a pipeline; counts its steps and keeps its latest latents.

    options: keyword arguments to pass to the call: `callback_on_step_end`, or the older `callback` for PixArt.
    latents: those after the latest step; None before the first one and for pipelines that do not pass them on.
    """

    def __init__(self, pipe: DiffusionPipeline, progress: Callable[[int, int], None] | None = None) -> None:
        """progress: called with each step, from 1, and the number of steps."""
        self._pipe: Any = pipe
        self._progress = progress
        self.latents: Tensor | None = None
        known = inspect.signature(type(pipe).__call__).parameters
        older = "callback" in known and "callback_on_step_end" not in known
        self.options: dict[str, Any] = (
            {"callback": self._callback} if older else {"callback_on_step_end": self._step_end}
        )

    def _step_end(self, _pipe: Any, step: int, _time: object, tensors: dict[str, Any]) -> dict[str, Any]:
        self._callback(step, _time, tensors.get("latents"))
        return tensors

    def _callback(self, step: int, _time: object, latents: Tensor | None) -> None:
        self.latents = latents
        if self._progress is not None:
            self._progress(step + 1, len(self._pipe.scheduler.timesteps))

    def check(self, *prompts: str) -> None:
        """Raise UsageError if the latents of a prompt contain NaN or infinity.

        prompts: of the call, each with as many pictures. The picture would be black, and could be mistaken for an
        effect of the eraser.
        """
        if self.latents is None or bool((finite := self.latents.isfinite()).all()):
            return
        whole = [bool(rows.all()) for rows in finite.tensor_split(len(prompts))]
        raise UsageError(
            f"{type(self._pipe).__name__} produced NaN or infinite latents for {prompts[whole.index(False)]!r}: the "
            "picture is black because of overflow, not because of the eraser",
            mend="smaller --strength, --gate or --guidance, or --dtype float32",
        )
