"""Latent anchoring: which text states must keep their predictions (SPM, arXiv 2312.16145 Eq. 5-7)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from spm_hub.training.conditioning import Conditioning

if TYPE_CHECKING:  # programs that make erasers of text states have no diffusers
    from spm_hub.training.base_model import TeacherModel
    from spm_hub.training.data.prompts import PromptMaker
    from spm_hub.training.recipe.schema import Anchoring

CANDIDATES = 4  # prompts offered for each anchor drawn; the probabilities choose among them
_NEAREST = 1e-2


def anchor_weights(candidates: Tensor, target: Tensor, alpha: float) -> Tensor:
    """P(c~ | c_tar) ~ (1 - |cos(e(c~), e(c_tar))|)^alpha over flattened states.

    The paper's alpha is 1: far candidates are kept more often. A negative one keeps near ones more often.
    candidates: (n, tokens, d), target: (tokens, d); returns (n,), unnormalised, in float64.
    """
    cosine = F.cosine_similarity(candidates.double().flatten(1), target.double().flatten()[None], dim=1)
    # A negative power of 0 would let one candidate, the concept under another name, be all anchors.
    return (1 - cosine.abs()).clamp_min(0.0 if alpha >= 0 else _NEAREST) ** alpha


class AnchorSource:
    """Draws anchors: the conditioning whose predictions must stay."""

    def __init__(
        self, base: TeacherModel, recipe: Anchoring, target: str, maker: PromptMaker, surrogate: str = ""
    ) -> None:
        self._base, self._recipe, self._target, self._maker, self._surrogate = base, recipe, target, maker, surrogate

    def draw(self, count: int, generator: torch.Generator) -> Conditioning:
        """`count` anchors."""
        target = self._base.encode([self._target])[0]
        match self._recipe.source:
            case "gaussian":
                states = _gaussian(count, target.states, generator)
                pooled = None if target.pooled is None else _gaussian(count, target.pooled, generator)
                return replace(target.expand(count), states=states, pooled=pooled)
            case "surrogate":
                sentences = [self._maker.target(generator) for _ in range(count)]
                return self._base.encode([self._maker.without(text, self._surrogate) for text in sentences])
            case "given":
                prompts = list(self._recipe.prompts)
            case "text":
                prompts = [self._maker.anchor(generator) for _ in range(CANDIDATES * count)]
        rows = self._base.encode(prompts)
        weights = anchor_weights(rows.states, target.states, self._recipe.alpha).cpu()
        if not bool((weights > 0).any()):
            weights = torch.ones_like(weights)
        chosen = torch.multinomial(weights, count, replacement=True, generator=generator)
        return rows[chosen.to(rows.states.device)]


def _gaussian(count: int, target: Tensor, generator: torch.Generator) -> Tensor:
    """The released code's anchors: isotropic directions of norm U(0.8, 1.2) * ||e(c_tar)||.

    They are off the text encoder's manifold.
    """
    directions = torch.randn((count, target.numel()), generator=generator)
    norms = (0.8 + 0.4 * torch.rand((count, 1), generator=generator)) * target.float().norm().cpu()
    anchors: Tensor = (F.normalize(directions, dim=1) * norms).reshape(count, *target.shape).to(target)
    return anchors
