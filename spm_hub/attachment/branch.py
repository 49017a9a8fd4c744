"""Increments in effect beside a module: every row of a batch has its own factors, and the weight is left alone.

What is computed is the sum that `layers` defines. A module with increments beside it is of another class for as long.
It is not a forward hook, as torch.compile goes by the types of modules and by their attributes but not by their hooks:
a graph that it made without a hook would be used with one, and the erasers would be off. The factors are tensors that
such a graph is given, so other factors need no other graph.
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
from spm_hub.models.architectures import shape_of, weight_of

_EFFECT = "_spm_hub_beside"


def put_beside(module: nn.Module, stack: "Stack", gammas: Tensor) -> None:
    """From now on add to what `module` gives what `stack` does to each row; gammas: (rows, erasers of the stack)."""
    module.__dict__[_EFFECT] = _Effect(stack, gammas)
    kind: Any = type(module)
    if not hasattr(kind, _EFFECT):
        module.__class__ = _branched(kind)


def take_away(module: nn.Module) -> None:
    """Undo `put_beside`, if anything is there: the module has its own class and its own attributes again."""
    if module.__dict__.pop(_EFFECT, None) is not None:
        module.__class__ = type(module).__mro__[1]


@functools.cache
def _branched(base: Any) -> Any:
    """A subclass of `base` under its name; one for each base, so that torch.compile never sees a new one."""

    class Branched(base):  # type: ignore[misc]
        _spm_hub_beside: "_Effect | None" = None

        # Not `forward`: offloading and quantisation replace that on the module itself, and act inside of this.
        def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            effect = self._spm_hub_beside
            if effect is None:
                return base.__call__(self, x, *args, **kwargs)  # type: ignore[no-any-return]
            output = base.__call__(self, effect.masked(self, x), *args, **kwargs)
            return effect.added(self, x, output)

    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Branched, attribute, getattr(base, attribute))
    return Branched


@dataclass(eq=False)
class Stack:
    """The increments of several erasers on one module; tensors follow the module's input to its device and dtype.

    read: gives the increment of an eraser, again where an input is wider than the one that the tensors were cast for.
    like: without elements, of the device and dtype where the tensors are.
    down: (sum of ranks, in[, kh, kw]), up: (out, sum of ranks[, 1, 1]), None without low-rank increments;
    owners: for each rank, each dense increment and each mask the index of its eraser in `names`.
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
        """The tensors, from the increments themselves, as they are beside `like`."""
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
                # A grouped convolution has no skinny form: each group would need its own columns of `up`.
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
        """Move to the device and dtype of `like`; a mask stays boolean."""
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


class _Effect:
    """What a stack does to the rows of a batch. gammas: (rows, erasers of the stack)."""

    def __init__(self, stack: Stack, gammas: Tensor) -> None:
        self._stack = stack
        self._given = gammas
        self._gammas = gammas.to(stack.like)
        self._ranks = self._gammas[:, stack.rank_owners]

    def masked(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input without what masks switch off: the same as switching off columns of the weight."""
        if self._gammas.dtype != x.dtype or self._gammas.device != x.device:
            # An offloaded module is elsewhere while it rests, a quantised one says little about its input.
            self._stack.follow(module, x)
            self._gammas = self._given.to(x)
            self._ranks = self._gammas[:, self._stack.rank_owners]
        scale = self._mask_scale(1, len(x))
        if scale is None:
            return x
        # The columns of a grouped convolution stand for one channel of every group.
        scale = scale.repeat(1, getattr(module, "groups", 1))
        return x * _spread(scale, x.dim(), _channels(module, x))

    def added(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """`output`, what the module gave for the masked x, with everything else that is in the stack."""
        stack, channels = self._stack, _channels(module, x)
        scale = self._mask_scale(0, len(x))
        if scale is not None:
            output = output * _spread(scale, output.dim(), channels)
        if stack.down is not None and stack.up is not None:
            inner = _product(module, x, stack.down)
            inner = inner.mul_(_spread(_aligned(self._ranks, len(x)), x.dim(), channels))
            output = _plus_product(output, inner, stack.up)
        for owner, delta, delta_bias in stack.dense:
            gamma = _aligned(self._gammas[:, owner, None], len(x))
            output = output + _product(module, x * _spread(gamma, x.dim(), channels), delta)
            if delta_bias is not None:
                output = output + _spread(gamma * delta_bias, output.dim(), channels)
        return output

    def _mask_scale(self, dim: int, rows: int) -> Tensor | None:
        scale = None
        for owner, along, off in self._stack.masks:
            if along == dim:
                factor = 1 - _aligned(self._gammas[:, owner, None], rows) * off
                scale = factor if scale is None else scale * factor
        return scale


def _aligned(gammas: Tensor, rows: int) -> Tensor:
    """Gammas for the rows that this module sees: (rows, n) of (rows of the batch, n)."""
    if len(gammas) == rows:
        return gammas
    if rows % len(gammas) == 0:
        # A video model folds its frames into the batch, the frames of a row side by side.
        return gammas.repeat_interleave(rows // len(gammas), dim=0)
    if rows < len(gammas):
        # A part of the batch: the guided half alone (FasterCache), two thirds (PAG), or some rows at a time. Whatever
        # part it is, a row gets what the most erased of those gets that may stand in its place.
        period = math.gcd(rows, len(gammas))
        return gammas.view(-1, period, gammas.shape[1]).amax(dim=0).repeat(rows // period, 1)
    # Rows that are shared by the batch serve the one that is erased most: never silently off.
    return gammas.amax(dim=0, keepdim=True).expand(rows, -1)


def _channels(module: nn.Module, x: Tensor) -> int:
    return 1 if isinstance(module, nn.Conv2d) else x.dim() - 1


def _product(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `module` would give with another weight and no bias."""
    if isinstance(module, nn.Conv2d):
        product: Tensor = module._conv_forward(x, weight, None)
        return product
    return F.linear(x, weight)


def _plus_product(output: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """`output` + up @ inner along the channels, written into `output` itself where its layout lets one product do it.

    output: (n, ..., out) of a Linear, (n, out, h, w) of a Conv2d; inner: the same with the ranks in place of out;
    up: (out, ranks[, 1, 1]).
    """
    # Under autocast the module gives another dtype than it is given; what writes in place is not cast there.
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


def _spread(values: Tensor, dims: int, channels: int) -> Tensor:
    """(rows, channels) broadcast against a tensor of `dims` dimensions whose channels are dimension `channels`."""
    shape = [1] * dims
    shape[0], shape[channels] = values.shape
    return values.view(shape)
