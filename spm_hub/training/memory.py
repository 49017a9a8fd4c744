"""Counts what training keeps in memory, and chooses how many rows go through the denoiser at once.

Between a prediction and its gradient, autograd keeps tensors of every layer for every row: 43 GiB for the default batch
on Stable Diffusion 1.5 at 512 pixels. Rows can go one group after the other, each predicted again when its gradient is
due, and inside a group the denoiser can keep the inputs of its blocks alone. Both give the whole batch's gradient, to
rounding; each costs about one forward pass more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spm_hub.errors import RecipeError

GIB = 2**30
_USED = 0.75
"""Share of the free memory that is given to what autograd keeps; the rest is for what a layer computes with."""
_SMALL = 100 * 2**20
"""Bytes of weights of a denoiser that is not counted: a batch of it fits anywhere."""


@dataclass(frozen=True)
class Split:
    """The way of a batch through the denoiser.

    rows: at once, None for all.  checkpointing: keep the inputs of the denoiser's blocks alone.
    """

    rows: int | None = None
    checkpointing: bool = False

    @property
    def passes(self) -> int:
        """Forward passes of a row until its gradient is there."""
        return 1 + (self.rows is not None) + self.checkpointing


@dataclass(frozen=True)
class Plan:
    """The rows and memory of one step of a training.

    rows: with gradient.  room: bytes that autograd may keep.  split: how the rows fit; kept: bytes then.
    """

    rows: int
    room: float
    split: Split
    kept: int


def whole_copy_without_values(denoiser: nn.Module) -> nn.Module:
    """Return a copy on the meta device: all shapes and layers, and no values."""
    memo: dict[int, Any] = {}
    for one in (*denoiser.parameters(), *denoiser.buffers()):
        empty = torch.empty_like(one, device="meta")
        memo[id(one)] = nn.Parameter(empty, requires_grad=False) if isinstance(one, nn.Parameter) else empty
    return copy.deepcopy(denoiser, memo)


def kept_by_one_row(denoiser: nn.Module, arguments: Mapping[str, Any], *, checkpointing: bool) -> int:
    """Return the bytes that autograd keeps of a call with one row until its gradient is there.

    denoiser: on the meta device, with what is trained in effect.  arguments: of the call, on the meta device.
    checkpointing: its blocks keep their inputs alone; the one that keeps most meanwhile is counted too.
    Attention counts as a fused kernel keeps it: queries, keys, values, output, and a number for each query.
    """
    weights = {one.untyped_storage()._cdata for one in (*denoiser.parameters(), *denoiser.buffers())}
    outer, largest = _Counter(set(weights)), 0

    def block(function: Callable[..., Any], *given: Any) -> Any:
        nonlocal largest
        for one in given:
            if isinstance(one, Tensor):
                outer.add(one)
        inner = _Counter(set(weights))
        with torch.autograd.graph.saved_tensors_hooks(inner.add, _unread):
            output = function(*given)
        largest = max(largest, inner.bytes)
        return output

    with (
        block_inputs_alone(denoiser, block) if checkpointing else nullcontext(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(outer.add, _unread),
        _FusedAttention(),
    ):
        denoiser(**arguments)
    return outer.bytes + largest


def fitted(rows: int, room: float, count: Callable[[bool], int], what: str) -> Plan:
    """Return how `rows` fit into `room` bytes, with the fewest passes.

    count: whether blocks keep their inputs alone -> bytes kept for a row.  what: the model and its picture, for the
    error. Raises RecipeError if not even one row fits.
    """
    plans = []
    for checkpointing in (False, True):
        kept = count(checkpointing)
        fitting = min(rows, int(room // kept)) if room < math.inf else rows
        if fitting >= 1:
            split = Split(None if fitting == rows else fitting, checkpointing)
            plans.append(Plan(rows, room, split, fitting * kept))
            if split.passes <= 2:
                break
    if not plans:
        raise RecipeError(
            f"one row of {what} keeps {kept / GIB:.1f} GiB for its gradient, and {max(0.0, room) / GIB:.1f} GiB "
            "are there for it",
            mend="--dtype bfloat16 or a smaller --set resolution=N; or --method instant, which needs no gradient",
        )
    return min(plans, key=lambda plan: plan.split.passes)


def is_small(denoiser: nn.Module) -> bool:
    """Return whether a batch of this denoiser fits anywhere."""
    return sum(one.nbytes for one in denoiser.parameters()) < _SMALL


def room_on(device: torch.device, memory: float | None, weights: int, *, loaded: bool) -> float | None:
    """Return the bytes that autograd may keep on `device`; None where the device does not tell.

    memory: GiB that the training may use in all; None for all that is free.  weights: bytes of the base's.  loaded:
    whether these are there already.
    """
    if memory is not None:
        return _USED * (memory * GIB - weights)
    free = None
    if device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = float(torch.cuda.mem_get_info(device)[0] + reusable)
    elif device.type == "cpu":
        free = _free_on_this_machine()
    return None if free is None else _USED * (free - (0 if loaded else weights))


def _free_on_this_machine() -> float | None:
    """Return the bytes that Linux says are available; None elsewhere."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return None


@contextmanager
def block_inputs_alone(denoiser: nn.Module, by: Callable[..., Any] | None = None) -> Iterator[None]:
    """Inside, the denoiser's blocks keep their inputs alone, and compute the rest again for the gradient.

    by: calls a block, (block, *inputs) -> its output; None is torch's checkpoint. Nothing changes for a denoiser whose
    class cannot, or that does so already.
    """
    able: Any = denoiser
    if not getattr(able, "_supports_gradient_checkpointing", False) or able.is_gradient_checkpointing:
        yield
        return
    able.enable_gradient_checkpointing(by)
    try:
        yield
    finally:
        able.disable_gradient_checkpointing()


class _Counter:
    """Counts the storages of tensors, each once; those of `known` tensors are not counted."""

    def __init__(self, known: set[int]) -> None:
        self._known, self._alive = known, list[Tensor]()
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._alive.append(tensor)  # or another storage could take its address
            self.bytes += storage.nbytes()
        return tensor


def _unread(tensor: Tensor) -> Tensor:
    return tensor


class _FusedAttention(TorchFunctionMode):
    """Counts attention as the kernels of accelerators keep it; on meta it would be taken apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        names = ("query", "key", "value")
        read = (given[name] if name in given else args[at] for at, name in enumerate(names))
        return _Attention.apply(*read)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output
