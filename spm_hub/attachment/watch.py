"""Asks the denoiser for evidence of erased concepts: see `gates.evidence`."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.bank import lengths_of
from spm_hub.attachment.gates.evidence import Evidence, EvidenceGate, shares_of_effect
from spm_hub.attachment.options import Eraser
from spm_hub.attachment.planner import Planner
from spm_hub.attachment.text_encoding import CannotEncodeError
from spm_hub.models.architectures import body_of


class Again(Protocol):
    """Calls the denoiser again, without gradients, with some rows of its inputs."""

    def __call__(
        self, part: slice, states: Tensor | None, noisy: Tensor | None = None, moment: float = 0.5, /
    ) -> Tensor:
        """Return its prediction.

        part: of the batch.  states: those of the text, None for its own.  noisy: in place of its latents, None for
        noise of a fixed seed.  moment: the timestep, as a share of the schedule.
        """


_BY_TEXT = "erasers of the evidence gate are gated by the text alone"


class Watch:
    """Raises gammas of a call to 1 where the denoiser shows that a prompt is one for the concept.

    Not thread-safe by itself: an `Attachment` calls it under its lock.
    """

    def __init__(self, denoiser: nn.Module, planner: Planner) -> None:
        self._denoiser, self._planner = denoiser, planner

    def encode_names(self, call: Call) -> None:
        """Encode the names of the erasers that this call will be watched for, while the text encoder is there."""
        for eraser in self._watched(call).values():
            _encoded(call, eraser)

    def look(self, call: Call, rows: int | None, states: object, again: Again) -> bool:
        """Record the evidence about this call's prompts, unless that is done.

        Return whether gammas may have risen.

        rows, states: of the denoiser's batch, whose text gammas are in effect.
        """
        erasers, block = {} if call.watched else self._watched(call), call.rows_per_block
        prompted = [index for index, other in enumerate(call.unconditional) if not other]
        if not erasers or not block or rows is None or rows % block or not prompted:
            return False  # the next call may be of the prompts: some pipelines call for negative prompts apart
        call.watched = True
        if (why := why_not(self._denoiser, states, rows)) is not None:
            self._planner.warn_once(f"{why}: {_BY_TEXT}")
            return False
        assert isinstance(states, Tensor)
        # Layouts that are not plain guidance stay whole, as layers may rely on them.
        guided = call.unconditional == (True, False)
        part = slice(block if guided else 0, None, call.images if guided or rows == block else 1)
        for name, shares in self._shares(call, erasers, states[part], part, again).items():
            if len(shares) > len(call.gammas[name]):
                shares = shares.view(-1, block)[prompted[0], :: call.images]
            gate = erasers[name].gate
            assert isinstance(gate, EvidenceGate)
            call.evidence[name] = tuple(
                Evidence(share, max(gamma, float(share >= gate.sure)))
                for share, gamma in zip(shares.tolist(), call.gammas[name], strict=True)
            )
        return True

    def _shares(
        self, call: Call, erasers: Mapping[str, Eraser], states: Tensor, part: slice, again: Again
    ) -> dict[str, Tensor]:
        """Return for each eraser the share of its effect on the name, (rows of the part,)."""
        names, empty = names_of(call, erasers, states, self._planner)
        self._planner.put_alone(None)
        bare, of_empty = again(part, None), again(part, empty)
        of_names = {name: again(part, row) for name, row in names.items()}
        found = {}
        for name, row in names.items():
            self._planner.put_alone(name)
            everywhere = of_empty - again(part, empty)
            effect, on_name = bare - again(part, None), of_names[name] - again(part, row)
            found[name] = shares_of_effect(effect - everywhere, on_name - everywhere)
        return found

    def _watched(self, call: Call) -> dict[str, Eraser]:
        """Return the erasers that the text of this call leaves less than fully on, by name."""
        return {
            name: eraser
            for name, eraser in self._planner.erasers.items()
            if isinstance(eraser.gate, EvidenceGate)
            and eraser.strength
            and self._planner.may_act(name)
            and min(call.gammas.get(name, [1.0])) < 1
        }


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
        encoded = _encoded(call, eraser)
        if encoded is not None and encoded[0].shape[1] == states.shape[-1]:
            names[name], empty = (_fitted(each.to(states), states.shape[1]).expand_as(states) for each in encoded)
    if len(names) < len(erasers):
        unknown = ", ".join(sorted(erasers.keys() - names.keys()))
        planner.warn_once(f"the names of {unknown} cannot be encoded: {_BY_TEXT}")
    return names, empty


def _encoded(call: Call, eraser: Eraser) -> tuple[Tensor, Tensor] | None:
    """Return the states of an eraser's name and of the empty prompt, None where they cannot be encoded."""
    try:
        return call.gates.target_states(eraser, call.settings), call.gates.empty_states(call.settings)
    except CannotEncodeError:
        return None


def _fitted(states: Tensor, length: int) -> Tensor:
    """Cut states (tokens, d_text) to a length, or repeat the last: (length, d_text)."""
    used = states[: lengths_of(states[None])[0]]
    return torch.cat([used, used[-1:].expand(max(0, length - len(used)), -1)])[:length]
