"""The evidence gate: the calibrated gate, and what the denoiser makes of a prompt.

Before the first step of a picture the denoiser is asked, on noise of a fixed seed and at a timestep in the middle, what
an eraser would change for the prompt and what it changes for the concept's name, each without what it changes for the
empty prompt. Where the first is a good part of the second, the prompt is one for the concept, whatever its words and
its text-encoder states are, and the eraser is fully on.

After the last step the finished picture is looked at (`attachment.watch.picture_check`): noise is added to it, and the
denoiser predicts that noise for the name and for the empty prompt. Where the name explains the picture, it is drawn
again with the eraser fully on, from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spm_hub.attachment.gates.calibrated import CalibratedGate, PreparedCalibratedGate
from spm_hub.attachment.gates.gate import Explanation, GatedEraser, PreparedGate, Prompts, TextEncoder

SURE_SHARE = 0.18
"""Of the effect on the name: a prompt that reaches it is one for the concept, whatever its picture shows."""

LEAST_SHARE, LEAST_SHOWN = 0.12, 0.5
"""The bars of the two kinds of evidence, each for the case that there is nothing of the other."""

LEAST_TRACE = 0.1
"""A picture that shows less than this of a concept is left as it is, whatever its prompt is."""

LEAST_EFFECT = 0.02
"""A share below which the eraser changes nothing of a prompt's picture, so that drawing it again would be in vain."""


@dataclass(frozen=True)
class Evidence:
    """The evidence about one prompt and eraser, and the gamma that follows.

    share: of the eraser's effect on the concept's name, 1 for the name itself.  gamma: before `threshold`, `top_k` and
    the eraser's strength.  shown: how far the name explained the finished picture, 0 as the empty prompt, 1 wholly;
    None where no picture was looked at.
    """

    share: float
    gamma: float
    shown: float | None = None


@dataclass(frozen=True)
class EvidenceGate:
    """The evidence gate: `prepare` calibrates its text part.

    Its gammas of a text are the calibrated gate's; for those below 1 the denoiser is asked.
    sure: share of the eraser's effect on the name, at which it is fully on before the picture is drawn.
    least_share, least_shown: the bars of the evidence from the prompt and from the finished picture. Where the parts
        that are reached of both add up to 1, the picture is drawn again with the eraser fully on.
    """

    sure: float = SURE_SHARE
    least_share: float = LEAST_SHARE
    least_shown: float = LEAST_SHOWN

    def prepare(self, encoder: TextEncoder, erasers: Sequence[GatedEraser]) -> PreparedGate:
        """Calibrate the gate as `CalibratedGate.prepare` does."""
        return PreparedEvidenceGate(CalibratedGate().prepare(encoder, erasers))

    def may_rise(self, one: Evidence) -> bool:
        """Return whether a finished picture may raise gamma."""
        return one.gamma < 1 and one.share >= LEAST_EFFECT

    def weigh(self, share: float, shown: float) -> float:
        """Return the weight of the evidence from a prompt and from its finished picture together; 1 is enough."""
        if shown < LEAST_TRACE:
            return 0.0
        return max(share, 0.0) / self.least_share + shown / self.least_shown


class PreparedEvidenceGate:
    """The part of the evidence gate that reads texts, for some erasers under one text encoder."""

    def __init__(self, of_text: PreparedCalibratedGate) -> None:
        self._of_text = of_text

    def gammas(self, prompts: Prompts) -> Tensor:
        """Return gamma of every prompt and eraser as the text shows it: (prompts, erasers), float64."""
        return self._of_text.gammas(prompts)

    def scores(self, states: Tensor) -> Tensor:
        """Return the scores of the text, as `PreparedCalibratedGate.scores` does."""
        return self._of_text.scores(states)

    def explain(self, prompts: Prompts) -> list[Explanation]:
        """Return for every eraser what the text shows, and say that the denoiser may show more."""
        return [
            one if one.gamma >= 1 else replace(one, shown=f"{one.shown}; the denoiser may show more")
            for one in self._of_text.explain(prompts)
        ]


def shares_of_effect(effect: Tensor, on_name: Tensor) -> Tensor:
    """Return <e, d> / <d, d> of each row: (rows,), float64; 0 where the eraser does nothing to the name.

    effect, on_name: (rows, ...), e and d, the eraser's effects on the predictions for the prompt and for the name, each
    less its effect on that for the empty prompt.
    """
    e, d = (each.detach().to("cpu", torch.float64).flatten(1) for each in (effect, on_name))
    return ((e * d).sum(1) / d.square().sum(1).clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(0.0, 0.0, 0.0)
