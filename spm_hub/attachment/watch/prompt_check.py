"""Asks the denoiser, before the first step, what the erasers would change for the prompts."""

from collections.abc import Mapping

from torch import Tensor, nn

from spm_hub.attachment.call import Call
from spm_hub.attachment.gates.evidence import Evidence, EvidenceGate, shares_of_effect
from spm_hub.attachment.options import Eraser
from spm_hub.attachment.planner import Planner
from spm_hub.attachment.watch.asking import BY_TEXT, Again, encoded_of, names_of, why_not


class PromptCheck:
    """Raises gammas of a call to 1 where the denoiser shows that a prompt is one for the concept.

    Not thread-safe by itself: an `Attachment` calls it under its lock.
    """

    def __init__(self, denoiser: nn.Module, planner: Planner) -> None:
        self._denoiser, self._planner = denoiser, planner

    def encode_names(self, call: Call) -> None:
        """Encode the names of the erasers that this call will be watched for, while the text encoder is there."""
        for eraser in self._watched(call).values():
            encoded_of(call, eraser)

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
            self._planner.warn_once(f"{why}: {BY_TEXT}")
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
