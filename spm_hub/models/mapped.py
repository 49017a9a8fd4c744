"""Marks a part of a pipeline whose weights stay in their file, in the precision of the file.

Such weights are pages of the file: one is in memory only while it is read. So a method that reads a few weights of a
denoiser, and predicts nothing, needs no more memory than these. The precision that the part would be loaded in to
compute is kept beside it, as the model's stamp and its predictions depend on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

WORTH_IT = 100 * 2**20
"""Bytes of a denoiser's files from which on its weights stay there; a smaller one is read at once, and can predict."""
_INTENDED = "_spm_hub_intended_dtype"


def mark_mapped(part: nn.Module, intended: torch.dtype) -> None:
    """Note that the weights of `part` stay in their file, and in which precision it would compute."""
    setattr(part, _INTENDED, intended)


def is_mapped(part: nn.Module) -> bool:
    """Return whether the weights of `part` stay in their file, so that it cannot predict."""
    return _INTENDED in vars(part)


def intended_dtype(part: nn.Module) -> torch.dtype:
    """Return the precision that `part` computes in, or would if it left its file."""
    found: torch.dtype = vars(part).get(_INTENDED) or next(part.parameters()).dtype
    return found
