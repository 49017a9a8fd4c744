"""Finds out whether a model's weights contain an eraser's change already: whether it was baked."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from spm_hub.adapters.adapter import Adapter, load_file
from spm_hub.adapters.baking import PROVENANCE, eraser_file, read_provenance
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import SpmHubError
from spm_hub.models.architectures import weight_of

_READ = 2**22
"""The most elements of weights that are read for one eraser: those come first that it changes most for their size."""
_SURE, _LEAST = 10.0, 0.3
"""A share counts from so many standard errors on, and from this size on: unrelated erasers have shares around 0."""


def baked_as(place: Path, adapter: Adapter) -> tuple[str, bool] | None:
    """Return the name under which a checkpoint folder records an eraser of this name or content.

    The name comes with whether the increments are the same. None if `place` records no such eraser, or cannot be read.
    """
    if not (place / PROVENANCE).is_file():
        return None
    try:
        for baked in read_provenance(place).erasers:
            known = load_file(eraser_file(place, baked.name))
            if known.content == adapter.content or known.name == adapter.name:
                return baked.name, known.content == adapter.content
    except SpmHubError:
        return None
    return None


def remark_on_presence(
    adapter: Adapter, modules: Mapping[str, nn.Module], increments: Mapping[str, Increment]
) -> str | None:
    """Say that the weights seem to contain an eraser's change already; None if they do not.

    modules, increments: those of the eraser, by the same paths.
    """
    share = share_in_weights(modules, increments)
    if share is None:
        return None
    return (
        f"this model's weights seem to contain {adapter.name} already ({share:.0%} of its change): it was probably "
        "baked in or fused. A second time it erases twice; use it on the plain model instead"
    )


def share_in_weights(modules: Mapping[str, nn.Module], increments: Mapping[str, Increment]) -> float | None:
    """Estimate how much of an eraser's change the weights contain.

    It is about 0 normally, and about 1 once the change was baked in: the coefficient of the change in the weights,
    sum <W, dW> / sum <dW, dW>, each module weighed by the inverse of its weights' variance. Weights that know nothing
    of the change are noise around 0. For masks it is the share of the neurons switched off whose weights are all zero.
    modules, increments: by the same paths. Returns None for a share that is small or too uncertain, and where weights
    are not plain numbers in memory.
    """
    of_masks = [increment for increment in increments.values() if isinstance(increment, Mask)]
    if of_masks:
        return _share_of_masks(modules, increments)
    overlap = size = 0.0
    left = _READ
    for path, increment in sorted(increments.items(), key=_strength_for_its_size, reverse=True):
        weight = weight_of(modules[path])
        if weight.is_meta or type(weight) is not nn.Parameter or not weight.is_floating_point():
            return None
        left -= weight.numel()
        if left < 0 and size:
            break
        with torch.no_grad():
            wide = weight.detach().float().reshape(len(weight), -1)  # a norm's has one dimension
            both, own = _products(wide, increment)
            variance = float(wide.square().mean()) or 1.0
        overlap, size = overlap + both / variance, size + own / variance
    if size <= 0:
        return None
    share = overlap / size
    return share if share > _LEAST and share * size**0.5 > _SURE else None


def _products(weight: Tensor, increment: Increment) -> tuple[float, float]:
    """Return <W, dW> and <dW, dW>; weight: (out, rest), float32."""
    if isinstance(increment, LowRank):
        up, down = (part.to(weight).flatten(1) for part in (increment.up, increment.down))
        return float(((weight @ down.T) * up).sum()), float(((up.T @ up) * (down @ down.T)).sum())
    assert isinstance(increment, Dense)
    delta = increment.delta.to(weight).reshape(weight.shape)
    return float((weight * delta).sum()), float(delta.square().sum())


def _strength_for_its_size(item: tuple[str, Increment]) -> float:
    """Return the size of a change in relation to its elements, without forming the change."""
    increment = item[1]
    if not isinstance(increment, LowRank):
        return 0.0
    up, down = increment.up.float(), increment.down.float()
    return float(up.square().sum() * down.square().sum()) / (up.numel() * down.numel())


def _share_of_masks(modules: Mapping[str, nn.Module], increments: Mapping[str, Increment]) -> float | None:
    off = zero = 0
    for path, increment in increments.items():
        weight = weight_of(modules[path])
        if weight.is_meta or type(weight) is not nn.Parameter or not isinstance(increment, Mask):
            return None
        if weight.shape[increment.dim] != len(increment.keep):
            return None  # quantised weights are packed
        by_neuron = weight.detach().movedim(increment.dim, 0).flatten(1)[~increment.keep.to(weight.device)]
        off, zero = off + len(by_neuron), zero + int((by_neuron == 0).all(1).sum())
    return zero / off if off and zero / off > _LEAST else None
