"""Repeats calls of the denoiser with other inputs, to ask it about prompts and pictures."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.bank import lengths_of
from spm_hub.attachment.options import Eraser
from spm_hub.attachment.planner import Planner
from spm_hub.attachment.text_encoding import CannotEncodeError
from spm_hub.models.architectures import body_of

BY_TEXT = "erasers of the evidence gate are gated by the text alone"


class Again(Protocol):
    """Calls the denoiser again, without gradients, with some rows of its inputs."""

    def __call__(
        self, part: slice, states: Tensor | None, noisy: Tensor | None = None, moment: float = 0.5, /
    ) -> Tensor:
        """Return its prediction.

        part: of the batch.  states: those of the text, None for its own.  noisy: in place of its latents, None for
        noise of a fixed seed.  moment: the timestep, as a share of the schedule.
        """


def why_not(denoiser: nn.Module, states: object, rows: int) -> str | None:
    """Return why a call of the denoiser cannot be made again, None if it can."""
    if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != rows:
        return "the denoiser's states are not one row for each picture"
    if getattr(body_of(denoiser), "is_cache_enabled", False):
        return "the denoiser caches what it computed for the step before"
    return None


def names_of(
    call: Call, erasers: Mapping[str, Eraser], states: Tensor, planner: Planner
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the states of each eraser's name, and of the empty prompt, of the shape of `states`.

    Erasers whose names cannot be encoded are left out, with a warning.
    """
    names: dict[str, Tensor] = {}
    empty = states
    for name, eraser in erasers.items():
        encoded = encoded_of(call, eraser)
        if encoded is not None and encoded[0].shape[1] == states.shape[-1]:
            names[name], empty = (_fitted(each.to(states), states.shape[1]).expand_as(states) for each in encoded)
    if len(names) < len(erasers):
        unknown = ", ".join(sorted(erasers.keys() - names.keys()))
        planner.warn_once(f"the names of {unknown} cannot be encoded: {BY_TEXT}")
    return names, empty


def encoded_of(call: Call, eraser: Eraser) -> tuple[Tensor, Tensor] | None:
    """Return the states of an eraser's name and of the empty prompt, None where they cannot be encoded."""
    try:
        return call.gates.target_states(eraser, call.settings), call.gates.empty_states(call.settings)
    except CannotEncodeError:
        return None


def _fitted(states: Tensor, length: int) -> Tensor:
    """Cut states (tokens, d_text) to a length, or repeat the last: (length, d_text)."""
    used = states[: lengths_of(states[None])[0]]
    return torch.cat([used, used[-1:].expand(max(0, length - len(used)), -1)])[:length]
