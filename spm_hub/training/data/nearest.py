"""Ranks names by how near a base's text encoder puts them to a concept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spm_hub.training.base_model import TeacherModel

_AT_ONCE = 64
"""Names whose states are in memory at once: one of T5's is 16 MiB in float64."""


def nearest_names(base: TeacherModel, concepts: Sequence[str], candidates: Sequence[str], count: int) -> list[str]:
    """Return `count` of the candidates, the one nearest to any of the concepts first.

    Near is the cosine of all text states of the bare names, in float64.
    """

    def states(names: Sequence[str]) -> Tensor:
        base.forget()
        return base.encode(names, literally=True).states.double().flatten(1)

    own = states(concepts)
    parts = [candidates[start : start + _AT_ONCE] for start in range(0, len(candidates), _AT_ONCE)]
    near = torch.cat([F.cosine_similarity(states(part)[:, None], own[None], dim=2).amax(1) for part in parts])
    return [candidates[row] for row in near.argsort(descending=True, stable=True)[:count].tolist()]
