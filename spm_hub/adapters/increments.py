"""The three kinds of weight increments, which every training method ends in: LowRank, Dense and Mask."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spm_hub.errors import AdapterFileError, CompatibilityError


@dataclass(frozen=True, eq=False)
class LowRank:
    """`up @ down`, a product of rank r; any scale (alpha / rank) is already folded into `up`.

    down: (r, in) for a Linear, (r, in, kh, kw) for a Conv2d;  up: (out, r) or (out, r, 1, 1).
    SPM (arXiv 2312.16145, section 3.1) is the case r = 1.
    """

    down: Tensor
    up: Tensor
    kind: ClassVar[Literal["low_rank"]] = "low_rank"

    def __post_init__(self) -> None:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if len(down) not in (2, 4) or len(up) not in (2, 4) or up[2:] not in ((), (1, 1)):
            raise CompatibilityError(f"not a low-rank pair: down {down}, up {up}")
        if down[0] != up[1] or down[0] == 0:
            raise CompatibilityError(f"down {down} and up {up} disagree on the rank")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight this was trained on: (out, in) or (out, in, kh, kw)."""
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.down.dtype, self.up.dtype)

    @property
    def nbytes(self) -> int:
        return self.down.nbytes + self.up.nbytes

    def check_fits(self, module_path: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Refuse a module whose weight or bias this increment does not fit.

        module_path: named in the message.  weight: the module's, (out, in) or (out, in, kh, kw).  bias: the module's,
        (out,).
        Raises CompatibilityError.
        """
        _check_shape(module_path, self.weight_shape, weight)

    @property
    def is_zero(self) -> bool:
        """True if the product is zero because every term of it is."""
        return not bool((self.up.flatten(1).ne(0).any(0) & self.down.flatten(1).ne(0).any(1)).any())

    def delta_for(self, weight: Tensor) -> Tensor:
        """Return the change of `weight` at gamma 1: float32, shaped like `weight`.

        It is on the device of this increment.
        """
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts to be stored, by name."""
        return {"down": self.down, "up": self.up}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "LowRank":
        """Return the same increment in another dtype or on another device."""
        return LowRank(self.down.to(device=device, dtype=dtype), self.up.to(device=device, dtype=dtype))


@dataclass(frozen=True, eq=False)
class Dense:
    """A full change of a weight, and of its bias where that was trained too.

    delta: shaped like the weight, (out, in), (out, in, kh, kw), or (out,) for the scale of a norm;  delta_bias: (out,).
    """

    delta: Tensor
    delta_bias: Tensor | None = None
    kind: ClassVar[Literal["dense"]] = "dense"

    def __post_init__(self) -> None:
        shape = tuple(self.delta.shape)
        if len(shape) not in (1, 2, 4):
            raise CompatibilityError(f"not the change of a Linear, Conv2d or norm weight: {shape}")
        if self.delta_bias is not None and tuple(self.delta_bias.shape) != shape[:1]:
            raise CompatibilityError(
                f"delta {shape} and delta_bias {tuple(self.delta_bias.shape)} disagree on the outputs"
            )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight this was trained on: (out, in), (out, in, kh, kw), or (out,) for a norm."""
        return tuple(self.delta.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.delta.dtype

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def check_fits(self, module_path: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Refuse a module whose weight or bias this increment does not fit.

        module_path: named in the message.  weight: the module's, (out, in) or (out, in, kh, kw).  bias: the module's,
        (out,).
        Raises CompatibilityError.
        """
        _check_shape(module_path, self.weight_shape, weight)
        if self.delta_bias is not None and bias is None:
            raise CompatibilityError(
                f"{module_path}: the adapter changes a bias {tuple(self.delta_bias.shape)}, the model's module has none"
            )

    @property
    def is_zero(self) -> bool:
        """True if neither the weight nor the bias is changed."""
        return not any(bool(tensor.any()) for tensor in self.tensors().values())

    def delta_for(self, weight: Tensor) -> Tensor:
        """Return the change of `weight` at gamma 1: float32, shaped like `weight`.

        It is on the device of this increment.
        """
        return self.delta.float().reshape(weight.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts to be stored, by name."""
        return (
            {"delta": self.delta} if self.delta_bias is None else {"delta": self.delta, "delta_bias": self.delta_bias}
        )

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Dense":
        """Return the same increment in another dtype or on another device."""
        bias = None if self.delta_bias is None else self.delta_bias.to(device=device, dtype=dtype)
        return Dense(self.delta.to(device=device, dtype=dtype), bias)


@dataclass(frozen=True, eq=False)
class Mask:
    """Switches neurons off: where `keep` is False, rows or columns of the weight become zero.

    keep: bool, (out,) for dim 0, whose rows become zero with their bias, or (in,) for dim 1, the columns.
    Its delta depends on the base weight (Minimalist erasure, arXiv 2507.13386).
    """

    keep: Tensor
    dim: Literal[0, 1]
    kind: ClassVar[Literal["mask"]] = "mask"

    def __post_init__(self) -> None:
        if self.keep.dim() != 1 or self.keep.dtype is not torch.bool:
            raise CompatibilityError(f"a mask is a row of booleans, not {tuple(self.keep.shape)} of {self.keep.dtype}")

    @property
    def weight_shape(self) -> None:
        """None: a mask knows only one dimension of its weight."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bool

    @property
    def nbytes(self) -> int:
        return self.keep.nbytes

    def check_fits(self, module_path: str, weight: Tensor, bias: Tensor | None = None) -> None:
        """Refuse a module whose weight or bias this increment does not fit.

        module_path: named in the message.  weight: the module's, (out, in) or (out, in, kh, kw).  bias: the module's,
        (out,).
        Raises CompatibilityError.
        """
        if weight.dim() < 2 or weight.shape[self.dim] != len(self.keep):
            raise CompatibilityError(
                f"{module_path}: the adapter's mask has {len(self.keep)} entries for dimension {self.dim}, "
                f"the model's weight is {tuple(weight.shape)}"
            )

    @property
    def is_zero(self) -> bool:
        """True if nothing is switched off."""
        return bool(self.keep.all())

    def delta_for(self, weight: Tensor) -> Tensor:
        """Return the change of `weight` at gamma 1: float32, shaped like `weight`, on its device."""
        off = ~self.keep.to(weight.device)
        columns = off.reshape(-1 if self.dim == 0 else 1, -1 if self.dim == 1 else 1, *[1] * (weight.dim() - 2))
        # where() and not a product with 0 or 1: the untouched entries must be exactly zero, never -0 or nan.
        return torch.where(columns, -weight.float(), weight.new_zeros((), dtype=torch.float32))

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts to be stored, by name."""
        return {"keep_out" if self.dim == 0 else "keep_in": self.keep}

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "Mask":
        """Return the same mask on another device.

        It stays boolean: `dtype` is for the other kinds of increments.
        """
        return Mask(self.keep.to(device=device), self.dim)


Increment = LowRank | Dense | Mask


def tensors_of(increments: Mapping[str, Increment]) -> dict[tuple[str, str], Tensor]:
    """Return all tensors of increments, by module path and part."""
    return {(path, part): value for path, one in increments.items() for part, value in one.tensors().items()}


def check_effect(increments: Mapping[str, Increment], source: object, concept: str = "CONCEPT") -> None:
    """Refuse increments that change nothing, such as those of a LoRA that was never trained.

    source, concept: where they are from and what they were to erase, for the message. Reads no more of them than it has
    to. Raises AdapterFileError.
    """
    if all(increment.is_zero for increment in increments.values()):
        raise AdapterFileError(
            f"{source} changes nothing: all numbers of its change are zero ({len(increments)} "
            f"module{'s' if len(increments) > 1 else ''}), so it would erase nothing (a training that never began?)",
            mend=f"another file; or train one: spmhub train {shlex.quote(concept)}",
        )


def spread(values: Tensor, width: int, total: int) -> Tensor:
    """Spread values of neurons, or of attention heads, over a weight's dimension: (neurons,) -> (total,).

    Each neuron has `width` entries, the first neuron the first ones; entries after the last neuron's are 1, or True.
    """
    entries = values.repeat_interleave(width)
    return torch.cat([entries, entries.new_ones(total - len(entries))])


def without_no_op_masks(masks: Mapping[str, Mask]) -> dict[str, Mask]:
    """Leave out the masks that switch nothing off, unless all are such."""
    return {path: mask for path, mask in masks.items() if not bool(mask.keep.all())} or dict(masks)


def _check_shape(module_path: str, ours: tuple[int, ...], weight: Tensor) -> None:
    """Refuse weights of two shapes.

    A 1x1 convolution and a Linear of the same numbers are one thing (SD2 made proj_in and proj_out Linear).
    """
    theirs = tuple(weight.shape)
    if _without_unit_kernel(ours) != _without_unit_kernel(theirs):
        raise CompatibilityError(
            f"{module_path}: the adapter's increment is for a weight {ours}, the model's weight is {theirs}"
        )


def _without_unit_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape
