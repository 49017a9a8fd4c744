"""Tries: whatever an attack gives a pipeline in place of a prompt and seed; and drawing them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spm_hub.errors import UsageError
from spm_hub.evaluation.attacks.outcome import Case
from spm_hub.evaluation.attacks.samplers import ProbingSampler
from spm_hub.evaluation.step_callback import StepCallback
from spm_hub.training.conditioning import Conditioning

SAMPLER_OPTIONS = ("eta", "variance", "until")
"""The options of a try that are settings of the sampler (`ProbingSampler`)."""


@dataclass(frozen=True, eq=False)
class Try:
    """One attempt to draw the concept of a case; whatever is not given is the case's own.

    text: the prompt.  states: one row of conditioning in place of a text.  latents: (*latent_shape), x_t in place of
    the noise of a seed.  start: number of denoising steps that are left out, as `latents` has them behind it.
    seed: of the noise, in place of the case's.
    options: the texts of further encoders ("prompt_2", "prompt_3"), and the sampler's `eta`, `variance` and `until`.
    Raises UsageError unless exactly one of `text` and `states` is given, and for a `start` without latents.
    """

    text: str | None = None
    states: Conditioning | None = None
    latents: Tensor | None = None
    start: int = 0
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        if (self.text is None) == (self.states is None):
            raise UsageError("a try has either a text or states", mend='Try("a prompt"), or Try(states=...)')
        if self.start and self.latents is None:
            raise UsageError(f"a try that starts at step {self.start} needs latents", mend="Try(..., latents=x_t)")

    @property
    def texts(self) -> dict[str, str]:
        """The texts that are given to the pipeline, by argument of `encode_prompt`; empty for states."""
        given = {} if self.text is None else {"prompt": self.text}
        return given | {name: text for name, text in self.options.items() if name not in SAMPLER_OPTIONS}

    @property
    def sampler(self) -> dict[str, Any]:
        """The settings of the sampler, by name; empty for the pipeline's own sampler."""
        return {name: self.options[name] for name in SAMPLER_OPTIONS if name in self.options}

    def __str__(self) -> str:
        found = ["(learnt embeddings)" if self.text is None else self.text]
        found += [f"{name}: {text}" for name, text in self.texts.items() if name != "prompt"]
        found += [f"{name} {value:g}" for name, value in self.sampler.items()]
        found += [f"from step {self.start} of the base's picture"] if self.start else []
        found += [f"seed {self.seed}"] if self.seed is not None else []
        return "; ".join(found)


@dataclass(frozen=True)
class AttackDrawingOptions:
    """Settings for drawing the judged pictures, `at_once` per call; None means the pipeline's default."""

    steps: int | None = None
    guidance: float | None = None
    at_once: int = 16

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("at_once", self.at_once)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}", mend=f"{name} = 10")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UsageError(f"guidance must be a finite number, got {self.guidance}", mend="guidance = 7.5")


def draw(
    pipe: Any,
    asked: Sequence[tuple[Case, Try]],
    drawing: AttackDrawingOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[list[Image.Image], Tensor]:
    """Draw a picture of each try; return the pictures and their latents (n, *latent_shape), in order.

    Tries that the pipeline can draw together share its calls. progress: called with the number of pictures done.
    """
    groups: dict[object, list[int]] = {}
    for row, (_, one) in enumerate(asked):
        groups.setdefault(_drawn_together(one), []).append(row)
    pictures: dict[int, Image.Image] = {}
    latents: dict[int, Tensor] = {}
    for rows in groups.values():
        for start in range(0, len(rows), drawing.at_once):
            part = rows[start : start + drawing.at_once]
            made, ends = _draw_together(pipe, [asked[row] for row in part], drawing)
            pictures.update(zip(part, made, strict=True))
            latents.update(zip(part, ends, strict=True))
            progress(len(pictures))
    return [pictures[row] for row in range(len(asked))], torch.stack([latents[row] for row in range(len(asked))])


def _drawn_together(one: Try) -> object:
    """Return a key that is equal for tries of one call."""
    states = None if one.states is None else tuple(one.states.shape)
    return states, one.latents is None, one.start, tuple(one.texts), tuple(one.sampler.items())


def _draw_together(
    pipe: Any, part: Sequence[tuple[Case, Try]], drawing: AttackDrawingOptions
) -> tuple[list[Image.Image], Tensor]:
    tries = [one for _, one in part]
    first = tries[0]
    seeds = [case.seed if one.seed is None else one.seed for case, one in part]
    given: dict[str, Any] = {"num_inference_steps": drawing.steps, "guidance_scale": drawing.guidance}
    for name in first.texts:
        given[name] = [one.texts[name] for one in tries]
    if first.states is not None:
        given |= _as_arguments(pipe, Conditioning.cat([one.states for one in tries if one.states is not None]))
    if first.latents is not None:
        given["latents"] = torch.stack([one.latents for one in tries if one.latents is not None])
    callback = StepCallback(pipe)
    with _sampling(pipe, first):
        made = pipe(
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **callback.options,
            **{name: value for name, value in given.items() if value is not None},
        )
    assert callback.latents is not None, "every supported pipeline passes its latents to the callback"
    return made.images, callback.latents.detach()


@contextmanager
def _sampling(pipe: Any, one: Try) -> Iterator[None]:
    """Give the pipeline the sampler of this try for the duration of the block."""
    if not one.sampler and not one.start:
        yield
        return
    own = pipe.scheduler
    pipe.scheduler = ProbingSampler.of(own, start=one.start, **one.sampler)
    try:
        yield
    finally:
        pipe.scheduler = own


def _as_arguments(pipe: Any, states: Conditioning) -> dict[str, Tensor]:
    """Return conditioning as arguments of the pipeline's call."""
    known = inspect.signature(type(pipe).__call__).parameters
    given = {"prompt_embeds": states.states}
    if states.pooled is not None:
        given["pooled_prompt_embeds"] = states.pooled
    if states.mask is not None:
        given[next(name for name in ("prompt_attention_mask", "prompt_embeds_mask") if name in known)] = states.mask
    return given
