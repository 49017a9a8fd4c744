"""Draws the pictures of several orders in one call of a pipeline, each with erasers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from spm_hub.adapters.lookup import find_name
from spm_hub.attachment.attachment import Attachment
from spm_hub.errors import SpmHubError, UsageError
from spm_hub.evaluation.step_callback import StepCallback

Preview = Callable[[], "Image.Image | None"]
"""Decodes the latents of one picture as they are now; None for a pipeline whose latents are no picture's."""
Watcher = Callable[[int, int, Preview], object]
"""Called with the denoising steps done, their total, and what decodes the picture of this moment."""


@dataclass(frozen=True)
class Order:
    """One picture to draw.

    seed: of its noise.  negative: the negative prompt, None for none.  size: width and height in pixels; for it, steps
    and guidance None is the pipeline's default.  erasers: those that act, with their strengths, where None is the
    attached one's own; None for all that are attached when it is drawn.  recover: erasers that do not act all the same.
    exact: drawn in a call of its own, bit for bit as the pipeline alone draws it.
    """

    prompt: str
    seed: int
    negative: str | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    guidance: float | None = None
    erasers: Mapping[str, float | None] | None = None
    recover: frozenset[str] = frozenset()
    exact: bool = False
    watch: Watcher | None = field(default=None, compare=False)

    @property
    def settings(self) -> tuple[object, ...]:
        """The arguments of the call that all pictures of a batch share."""
        return self.size, self.steps, self.guidance, self.negative is None

    def choose(self, attached: Sequence[str]) -> dict[str, float | None]:
        """Return the strengths of the erasers that act on this picture, of these that are attached.

        Raises NotFoundError for an eraser that is not.
        """
        chosen: dict[str, float | None] = dict.fromkeys(attached)
        if self.erasers is not None:
            chosen = {find_name(name, attached): strength for name, strength in self.erasers.items()}
        left_out = {find_name(name, attached) for name in self.recover}
        return {name: strength for name, strength in chosen.items() if name not in left_out}


@dataclass(frozen=True)
class Drawn:
    """A picture, with the gammas that gave it.

    gammas, strengths: of the erasers that could act on it.  together: how many pictures shared its call.
    """

    picture: Image.Image
    gammas: Mapping[str, float]
    strengths: Mapping[str, float]
    together: int


def draw(pipe: Any, erasers: Attachment, orders: Sequence[Order]) -> list[Drawn | SpmHubError]:
    """Draw the pictures of orders with the same `settings` in one call.

    Returns an error in the place of each that failed.

    Raises NotFoundError for an eraser that is not attached, and what the call of the pipeline raises: then no picture
    was drawn.
    """
    chosen = [order.choose(erasers.names) for order in orders]
    first = orders[0]
    hidden = [erasers.may_draw_again(one) for one in chosen]
    callback = StepCallback(pipe, lambda step, total: _show(pipe, callback, orders, hidden, step, total))
    width, height = first.size or (None, None)
    given = {
        "width": width, "height": height, "num_inference_steps": first.steps,
        "guidance_scale": first.guidance,
        "negative_prompt": None if first.negative is None else [order.negative for order in orders],
    }  # fmt: skip
    with erasers.only(chosen):
        strengths = {name: erasers.strength[name] for name in erasers.names}
        try:
            made = pipe(
                prompt=[order.prompt for order in orders],
                generator=[torch.Generator("cpu").manual_seed(order.seed) for order in orders],
                **{name: value for name, value in given.items() if value is not None},
                **callback.options,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{type(pipe).__name__} cannot draw this: {str(error).strip()}",
                mend="leave out size, steps, guidance and negative_prompt",
            ) from error
        gammas = erasers.last_gammas
    return [
        _overflow(pipe)
        if overflowed
        else Drawn(
            picture,
            {name: gammas[name][row] for name in one if name in gammas},
            {name: strengths[name] if strength is None else strength for name, strength in one.items()},
            len(orders),
        )
        for row, (picture, one, overflowed) in enumerate(
            zip(made.images, chosen, _overflowed(callback.latents, len(orders)), strict=True)
        )
    ]


def preview(pipe: Any, latents: torch.Tensor) -> Image.Image | None:
    """Decode the latents (1, channels, height, width) of one picture, None for latents of another layout."""
    if latents.dim() != 4 or not hasattr(pipe, "vae"):
        return None
    config = pipe.vae.config
    scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    decoded = pipe.vae.decode(scaled.to(pipe.vae.dtype)).sample.detach()
    picture: Image.Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return picture


def _show(
    pipe: Any, callback: StepCallback, orders: Sequence[Order], hidden: Sequence[bool], step: int, total: int
) -> None:
    """Call the watchers of the pictures that are being drawn.  hidden: of each, whether its preview is."""
    for row, order in enumerate(orders):
        if order.watch is None:
            continue

        def decode(row: int = row) -> Image.Image | None:
            return None if callback.latents is None or hidden[row] else preview(pipe, callback.latents[row : row + 1])

        # A watcher that fails, as its client is gone, must not take the pictures of others with it.
        with suppress(Exception):
            order.watch(step, total, decode)


def _overflowed(latents: torch.Tensor | None, rows: int) -> list[bool]:
    """Return for each picture whether its latents hold NaN or infinity."""
    if latents is None or len(latents) != rows:
        return [False] * rows
    return [not finite for finite in latents.isfinite().flatten(1).all(dim=1).tolist()]


def _overflow(pipe: Any) -> SpmHubError:
    return UsageError(
        f"{type(pipe).__name__} produced NaN or infinite latents: the picture is black because of overflow",
        mend="smaller strengths or a smaller guidance, or start the server with --dtype float32",
    )
