"""LyCORIS' products of factors, LoHa and LoKr, multiplied out into dense changes.

Yeh et al., Navigating Text-to-Image Customization, ICLR 2024, arXiv 2309.14859: LoHa is (B1 A1) * (B2 A2), element by
element; LoKr is the Kronecker product of C and B A. Both are scaled by alpha / rank. For a convolution B A may have a
core (Tucker), a small convolution between the two; then each of them has a row for every rank.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.formats.slots import Part
from spm_hub.errors import CompatibilityError

_LOHA: tuple[Part, ...] = ("hada_w1_a", "hada_w1_b", "hada_t1", "hada_w2_a", "hada_w2_b", "hada_t2")
_LOKR: tuple[Part, ...] = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
FACTORS: frozenset[Part] = frozenset((*_LOHA, *_LOKR))
"""The parts that `product` takes."""

LARGEST_WEIGHT = 2**27
"""Entries; the largest weight of FLUX has half of that. Thin factors can make a delta of any size."""


def product(parts: Mapping[Part, Tensor], alpha: float | None) -> Tensor:
    """Return the delta of a LoHa's or LoKr's factors: float32, (out, in) or (out, in, kh, kw).

    Raises CompatibilityError for factors that do not fit, or whose product is larger than any weight.
    """
    wide = {part: tensor.double() for part, tensor in parts.items()}
    try:
        if "hada_w1_a" in wide:
            first = _factor(None, wide["hada_w1_a"], wide["hada_w1_b"], wide.get("hada_t1"))
            second = _factor(None, wide["hada_w2_a"], wide["hada_w2_b"], wide.get("hada_t2"))
            if first.shape != second.shape:
                raise CompatibilityError(f"{tuple(first.shape)} and {tuple(second.shape)} are the factors of no LoHa")
            delta = first * second
            rank: int | None = len(wide["hada_w1_b"])
        else:
            first = _factor(wide.get("lokr_w1"), wide.get("lokr_w1_a"), wide.get("lokr_w1_b"))
            second = _factor(wide.get("lokr_w2"), wide.get("lokr_w2_a"), wide.get("lokr_w2_b"), wide.get("lokr_t2"))
            check_size(first.numel() * second.numel())
            delta = torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)
            # If both are written out, there is no rank to scale by, and the programs that write them do not scale.
            rank = next((len(wide[part]) for part in ("lokr_w2_b", "lokr_w1_b") if part in wide), None)
    except (KeyError, IndexError, RuntimeError, TypeError) as error:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise CompatibilityError(f"{shapes} make no LoHa and no LoKr") from error
    if alpha is not None and rank is not None:
        delta *= alpha / rank
    return delta.float()


def through(core: Tensor, down: Tensor) -> Tensor:
    """Return a core times its `down` as one convolution: (r, s, kh, kw), (s, in) -> (r, in, kh, kw).

    float64. Raises CompatibilityError if they do not fit, or make more numbers than any weight has.
    """
    down = down.flatten(1)
    if core.dim() != 4 or core.shape[1] != len(down):
        raise CompatibilityError(
            f"a core of shape {tuple(core.shape)} does not fit a convolution whose first factor is {tuple(down.shape)}"
        )
    check_size(core[:, 0].numel() * down.shape[1])
    return torch.einsum("rskl,si->rikl", core.double(), down.double())


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None = None) -> Tensor:
    """Return one factor, whole or multiplied out: (out, in), or (out, in, kh, kw) for convolutions."""
    if whole is not None:
        return whole
    if a is None or b is None:
        raise KeyError("lokr")
    if core is None:
        check_size(len(a) * b.shape[1])
        return a @ b
    check_size(a.shape[1] * b.shape[1] * core[0, 0].numel())
    return torch.einsum("rikl,ro->oikl", through(core, b), a)


def check_size(entries: int) -> None:
    """Raise CompatibilityError for a product of more numbers than any weight has."""
    if entries > LARGEST_WEIGHT:
        raise CompatibilityError(f"its factors make {entries} numbers, no weight has more than {LARGEST_WEIGHT}")
