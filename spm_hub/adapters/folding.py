"""Computes a module's weight and bias under increments, as folded into a model or baked into a file."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask

_CACHED_ELEMENTS = 2**18
"""Elements of a weight that are computed at a time on the CPU: they stay in the cache until all parts are added."""


Parts = Sequence[tuple[Increment, float]]
"""Increments of one module and their factors."""


def effective(weight: Tensor, bias: Tensor | None, parts: Parts) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a module under `parts`: new tensors.

    A bias that no part changes is returned itself. Sums are accumulated in float32 (float64 for float64 weights) and
    rounded once to the dtype of `weight`. The result depends on `parts` and their order only.
    """
    total = torch.empty_like(weight, requires_grad=False)
    fill(total, weight.detach(), parts)
    return total, bias if bias is None else effective_bias(bias, parts)


def fill(out: Tensor, weight: Tensor, parts: Parts) -> None:
    """Write `weight` under `parts` into `out`, which is shaped like it and shares no memory with it."""
    if not (out.is_contiguous() and weight.is_contiguous()):
        total = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        fill(total, weight.contiguous(), parts)
        out.copy_(total)
        return
    wide = torch.promote_types(weight.dtype, torch.float32)
    source, target = weight.view(len(weight), -1), out.view(len(out), -1)
    up, down = _stacked(parts, wide, weight.device)
    step = max(1, _CACHED_ELEMENTS // source.shape[1]) if weight.device.type == "cpu" else len(source)
    for start in range(0, len(source), step):
        rows = slice(start, start + step)
        total = target[rows] if weight.dtype == wide else torch.empty_like(source[rows], dtype=wide)
        total.copy_(source[rows])
        shaped = total.view(-1, *weight.shape[1:])
        for increment, factor in parts:
            if isinstance(increment, Mask):
                scale = _mask_scale(increment, factor).to(total)
                shaped.mul_(_along(increment.dim, scale[rows] if increment.dim == 0 else scale, shaped.dim()))
        if up is not None and down is not None:
            total.addmm_(up[rows], down)
        for increment, factor in parts:
            if isinstance(increment, Dense):
                total.add_(increment.delta.view(len(source), -1)[rows].to(total), alpha=factor)
        if weight.dtype != wide:
            target[rows] = total.to(weight.dtype)


def _stacked(parts: Parts, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return all low-rank parts as one pair, or None twice.

    up: (out, ranks), with the factors multiplied in;  down: (ranks, in * kh * kw).
    """
    pairs = [(increment, factor) for increment, factor in parts if isinstance(increment, LowRank)]
    if not pairs:
        return None, None
    factors = [factor for increment, factor in pairs for _ in range(increment.rank)]
    up = torch.cat([increment.up.flatten(1) for increment, _ in pairs], dim=1).to(device, dtype)
    down = torch.cat([increment.down.flatten(1) for increment, _ in pairs]).to(device, dtype)
    return up * torch.tensor(factors, dtype=dtype, device=device), down


def effective_bias(bias: Tensor, parts: Parts) -> Tensor:
    """Return a module's bias under `parts`; the bias itself if no part touches it."""
    if not any(_touches_bias(increment) for increment, _ in parts):
        return bias
    total = bias.detach().to(torch.promote_types(bias.dtype, torch.float32), copy=True)
    for increment, factor in parts:
        if isinstance(increment, Mask) and increment.dim == 0:
            total.mul_(_mask_scale(increment, factor).to(total))
    for increment, factor in parts:
        if isinstance(increment, Dense) and increment.delta_bias is not None:
            total.add_(increment.delta_bias.to(total), alpha=factor)
    return total.to(bias.dtype)


def _along(dim: int, values: Tensor, dims: int) -> Tensor:
    """Return (n,) viewed along dimension `dim` of a tensor of `dims` dimensions."""
    return values.view([-1 if index == dim else 1 for index in range(dims)])


def _mask_scale(mask: Mask, factor: float) -> Tensor:
    """Return 1 where the mask keeps, and 1 - factor where it switches off; float64."""
    return 1 - factor * (~mask.keep).double()


def _touches_bias(increment: Increment) -> bool:
    if isinstance(increment, Mask):
        return increment.dim == 0
    return isinstance(increment, Dense) and increment.delta_bias is not None
