"""Adds increments to a module's output, with one factor per batch row; the weight is not modified.

The sum is the one that `layers` defines. The class of the module is swapped for a subclass while a branch is installed,
as torch.nn.utils.parametrize does. A forward hook would not do: torch.compile guards on the types and attributes of
modules but not on their hooks, and would run a graph that it compiled without the erasers. The factors are tensors and
inputs of such a graph, so other factors need no recompilation.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.models.architectures import is_norm, shape_of, weight_of

_BRANCH = "_spm_hub_branch"


def install(module: nn.Module, stack: "Stack", gammas: Tensor) -> None:
    """Add the increments of `stack` to the output of `module`; gammas: (rows, erasers of the stack)."""
    module.__dict__[_BRANCH] = _Branch(stack, gammas)
    kind: Any = type(module)
    if not hasattr(kind, _BRANCH):
        module.__class__ = _branched_class(kind)


def remove(module: nn.Module) -> None:
    """Undo `install`, if it was called: the module has its own class and its own attributes again."""
    if module.__dict__.pop(_BRANCH, None) is not None:
        module.__class__ = type(module).__mro__[1]


@functools.cache
def _branched_class(base: Any) -> Any:
    """Return the subclass of `base` that adds a branch; it has the name of `base`.

    One class for each base: torch.compile guards on types, and would recompile for a new one.
    """

    class Branched(base):  # type: ignore[misc]
        _spm_hub_branch: "_Branch | None" = None

        # Not `forward`: offloading and quantisation replace that on the module itself; they run inside this call.
        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            branch = self._spm_hub_branch
            if branch is None:
                return base.__call__(self, x, *args, **kwargs)  # type: ignore[no-any-return]
            output = base.__call__(self, branch.mask_input(self, x), *args, **kwargs)
            return branch.add_to(self, x, output)

    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Branched, attribute, getattr(base, attribute))
    return Branched


@dataclass(eq=False)
class Stack:
    """The increments of several erasers on one module, on the device and in the dtype of its input.

    read: returns the increment of an eraser; called again when an input has a wider dtype than the tensors.
    like: an empty tensor with the device and dtype of the others.
    down: (sum of ranks, in[, kh, kw]), up: (out, sum of ranks[, 1, 1]), None without low-rank increments;
    rank_owners, and the first element of each of dense and masks: the index of the eraser in `names`.
    dense: (owner, delta, delta_bias).  masks: (owner, dimension of the weight, which neurons are switched off).
    """

    names: list[str]
    read: Callable[[str], Increment]
    like: Tensor
    down: Tensor | None
    up: Tensor | None
    rank_owners: list[int]
    dense: list[tuple[int, Tensor, Tensor | None]]
    masks: list[tuple[int, int, Tensor]]

    @classmethod
    def of(cls, module: nn.Module, names: list[str], read: Callable[[str], Increment]) -> "Stack":
        weight = weight_of(module)
        at_rest = weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2
        like = torch.empty(0) if at_rest else torch.empty(0, dtype=weight.dtype, device=weight.device)
        stack = cls(names, read, like, None, None, [], [], [])
        stack.fill(module)
        return stack

    def fill(self, module: nn.Module) -> None:
        """Build the tensors from the increments, on the device and in the dtype of `like`."""
        shape = shape_of(module)
        pairs: list[tuple[int, LowRank]] = []
        dense: list[tuple[int, Tensor, Tensor | None]] = []
        masks: list[tuple[int, int, Tensor]] = []
        for owner, name in enumerate(self.names):
            increment = self.read(name)
            if isinstance(increment, Mask):
                masks.append((owner, increment.dim, ~increment.keep))
            elif isinstance(increment, Dense):
                dense.append((owner, increment.delta.view(shape), increment.delta_bias))
            elif isinstance(module, nn.Conv2d) and module.groups > 1:
                # Two small products cannot express a grouped convolution: each group needs its own columns of `up`.
                dense.append((owner, increment.delta_for(torch.empty(shape, device="meta")), None))
            else:
                pairs.append((owner, increment))
        down = up = None
        if pairs:
            wide = functools.reduce(torch.promote_types, (pair.dtype for _, pair in pairs))
            down = torch.cat([pair.down.to(wide).view(pair.rank, *shape[1:]) for _, pair in pairs])
            up = torch.cat([pair.up.to(wide).flatten(1) for _, pair in pairs], dim=1)
            up = up.view(*up.shape, *[1] * (len(shape) - 2))
        self.down, self.up, self.dense, self.masks = down, up, dense, masks
        self.rank_owners = [owner for owner, pair in pairs for _ in range(pair.rank)]
        self._cast(self.like)

    def follow(self, module: nn.Module, like: Tensor) -> None:
        """Move the tensors to the device and dtype of `like`; a mask stays boolean."""
        rounded = torch.promote_types(like.dtype, self.like.dtype) != self.like.dtype
        self.like = like.new_empty(0)
        if rounded:
            self.fill(module)
        else:
            self._cast(like)

    def _cast(self, like: Tensor) -> None:
        if self.down is not None and self.up is not None:
            self.down, self.up = self.down.to(like), self.up.to(like)
        self.dense = [
            (owner, delta.to(like), None if bias is None else bias.to(like)) for owner, delta, bias in self.dense
        ]
        self.masks = [(owner, dim, off.to(like.device)) for owner, dim, off in self.masks]


class _Branch:
    """A stack with the gammas of one batch: (rows, erasers of the stack)."""

    def __init__(self, stack: Stack, gammas: Tensor) -> None:
        self._stack = stack
        self._given = gammas
        self._gammas = gammas.to(stack.like)
        self._ranks = self._gammas[:, stack.rank_owners]

    def mask_input(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return x without the channels that masks switch off, as if columns of the weight were zero."""
        if self._gammas.dtype != x.dtype or self._gammas.device != x.device:
            # Between calls an offloaded weight is on another device; a quantised one has another dtype than the input.
            self._stack.follow(module, x)
            self._gammas = self._given.to(x)
            self._ranks = self._gammas[:, self._stack.rank_owners]
        scale = self._mask_scale(1, len(x))
        if scale is None:
            return x
        # A column of a grouped convolution's weight acts on one channel of every group.
        scale = scale.repeat(1, getattr(module, "groups", 1))
        return x * _broadcast(scale, x.dim(), _channel_dim(module, x))

    def add_to(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Return `output` with output masks, low-rank and dense increments applied.

        output: what the module returned for `mask_input(x)`.
        """
        stack, dim = self._stack, _channel_dim(module, x)
        scale = self._mask_scale(0, len(x))
        if scale is not None:
            output = output * _broadcast(scale, output.dim(), dim)
        if stack.down is not None and stack.up is not None:
            inner = _product(module, x, stack.down)
            inner = inner.mul_(_broadcast(_for_rows(self._ranks, len(x)), x.dim(), dim))
            output = _add_product(output, inner, stack.up)
        for owner, delta, delta_bias in stack.dense:
            gamma = _for_rows(self._gammas[:, owner, None], len(x))
            if is_norm(module):
                # A norm takes a factor on its input away again.
                output = output + _broadcast(gamma, output.dim(), dim) * _scaled_norm(module, x, delta).to(output.dtype)
            else:
                output = output + _product(module, x * _broadcast(gamma, x.dim(), dim), delta)
            if delta_bias is not None:
                output = output + _broadcast(gamma * delta_bias, output.dim(), dim)
        return output

    def _mask_scale(self, dim: int, rows: int) -> Tensor | None:
        scale = None
        for owner, along, off in self._stack.masks:
            if along == dim:
                factor = 1 - _for_rows(self._gammas[:, owner, None], rows) * off
                scale = factor if scale is None else scale * factor
        return scale


def _for_rows(gammas: Tensor, rows: int) -> Tensor:
    """Return the gammas of the rows that this module receives: (rows, n) from (rows of the batch, n)."""
    if len(gammas) == rows:
        return gammas
    if rows % len(gammas) == 0:
        # A video model reshapes frames into the batch; the frames of a row are consecutive.
        return gammas.repeat_interleave(rows // len(gammas), dim=0)
    if rows < len(gammas):
        # A part of the batch: the guided half alone (FasterCache), two thirds (PAG), or some rows at a time. Which part
        # is unknown, so a row gets the greatest gamma of the rows that it may be.
        period = math.gcd(rows, len(gammas))
        return gammas.view(-1, period, gammas.shape[1]).amax(dim=0).repeat(rows // period, 1)
    # Rows that are shared by the batch get its greatest gamma: an eraser is never silently off.
    return gammas.amax(dim=0, keepdim=True).expand(rows, -1)


def _channel_dim(module: nn.Module, x: Tensor) -> int:
    return 1 if isinstance(module, nn.Conv2d | nn.GroupNorm) else x.dim() - 1


def _scaled_norm(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output that the norm `module` would have with another weight and no bias."""
    eps: Any = module.eps
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, weight, None, eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, None, eps)
    return F.rms_norm(x, list(weight.shape), weight, eps)


def _product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return the output that `module` would have with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        product: Tensor = module._conv_forward(x, weight, None)
        return product
    return F.linear(x, weight)


def _add_product(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """Return `output` + up @ inner along the channels, in place where the layout allows one product.

    output: (n, ..., out) of a Linear, (n, out, h, w) of a Conv2d; inner: the same with the ranks in place of out;
    up: (out, ranks[, 1, 1]).
    """
    # Under autocast the output has another dtype than the input; in-place products are not cast there.
    inner, up = inner.to(output.dtype), up.to(output.dtype)
    if up.dim() == 4:
        if not (output.is_contiguous() and inner.is_contiguous()):
            return output + F.conv2d(inner, up)
        each = up.flatten(1).expand(len(output), -1, -1)
        output.flatten(2).baddbmm_(each, inner.flatten(2))
    elif not (output.is_contiguous() and inner.is_contiguous()):
        return output + F.linear(inner, up)
    else:
        output.view(-1, output.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), up.T)
    return output


def _broadcast(values: Tensor, dims: int, channel_dim: int) -> Tensor:
    """View (rows, channels) as a tensor of `dims` dimensions with the channels at `channel_dim`."""
    shape = [1] * dims
    shape[0], shape[channel_dim] = values.shape
    return values.view(shape)
