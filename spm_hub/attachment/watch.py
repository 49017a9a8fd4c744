"""Asks the denoiser for evidence of erased concepts: see `gates.evidence`."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.bank import lengths_of
from spm_hub.attachment.gates.evidence import Evidence, EvidenceGate, shares_of_effect
from spm_hub.attachment.options import Eraser
from spm_hub.attachment.planner import Planner
from spm_hub.attachment.text_encoding import CannotEncodeError
from spm_hub.models.architectures import body_of

Again = Callable[[slice, Tensor | None], Tensor]
"""Calls the denoiser again, on noise and without gradients, with some rows of its present inputs.

The states are others if they are given.
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
            self._states(call, eraser)

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
        if (why := self._why_not(states, rows)) is not None:
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
                Evidence(share, max(gamma, float(share >= gate.least_share)))
                for share, gamma in zip(shares.tolist(), call.gammas[name], strict=True)
            )
        return True

    def _shares(
        self, call: Call, erasers: Mapping[str, Eraser], states: Tensor, part: slice, again: Again
    ) -> dict[str, Tensor]:
        """Return for each eraser the share of its effect on the name, (rows of the part,)."""
        names: dict[str, Tensor] = {}
        empty = states
        for name, eraser in erasers.items():
            encoded = self._states(call, eraser)
            if encoded is not None and encoded[0].shape[1] == states.shape[-1]:
                names[name], empty = (_fitted(each.to(states), states.shape[1]).expand_as(states) for each in encoded)
        if len(names) < len(erasers):
            unknown = ", ".join(sorted(erasers.keys() - names.keys()))
            self._planner.warn_once(f"the names of {unknown} cannot be encoded: {_BY_TEXT}")
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

    def _states(self, call: Call, eraser: Eraser) -> tuple[Tensor, Tensor] | None:
        """Return the states of an eraser's name and of the empty prompt, None where they cannot be encoded."""
        try:
            return call.gates.target_states(eraser, call.settings), call.gates.empty_states(call.settings)
        except CannotEncodeError:
            return None

    def _why_not(self, states: object, rows: int) -> str | None:
        """Return why this call cannot be made again, None if it can."""
        if not isinstance(states, Tensor) or states.dim() != 3 or len(states) != rows:
            return "the denoiser's states are not one row for each picture"
        if getattr(body_of(self._denoiser), "is_cache_enabled", False):
            return "the denoiser caches what it computed for the step before"
        return None


def _fitted(states: Tensor, length: int) -> Tensor:
    """Cut states (tokens, d_text) to a length, or repeat the last: (length, d_text)."""
    used = states[: lengths_of(states[None])[0]]
    return torch.cat([used, used[-1:].expand(max(0, length - len(used)), -1)])[:length]
