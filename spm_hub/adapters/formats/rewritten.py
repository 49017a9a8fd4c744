"""Changes that are computed from the weight they belong to: OFT, BOFT, IA3, GLoRA, a bias alone.

OFT (Qiu et al., arXiv 2306.07280) rotates blocks of rows, BOFT (Liu et al., arXiv 2311.06243) does so several times
over interleaved rows, each rotation R = (I + Q)(I - Q)^-1 from a skew-symmetric Q; IA3 (arXiv 2205.05638) scales rows
or columns; GLoRA (arXiv 2306.07967) adds a product, and another one times the weight. As LyCORIS and kohya write them:
the blocks are applied transposed in OFT and as they are in BOFT, and alpha times the number of rows limits |Q|. PEFT's
OFT rotates columns instead, and its IA3 scales the bias too (`peft_kinds`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.formats.slots import Part
from spm_hub.adapters.increments import Dense
from spm_hub.errors import AdapterFileError, CompatibilityError

_OFT: tuple[Part, ...] = ("oft_blocks", "oft_blocks_0", "oft_blocks_1", "oft_blocks_2", "oft_blocks_3")
_GLORA: tuple[Part, ...] = ("glora_a1", "glora_a2", "glora_b1", "glora_b2")
PARTS: frozenset[Part] = frozenset((*_OFT, *_GLORA, "oft_diag", "rescale", "ia3", "on_input", "ia3_l", "oft_R"))
"""The parts that `rewrite` takes, alpha and a bias apart."""


def name_of(parts: Mapping[Part, Tensor]) -> str | None:
    """Return what these parts are in words, or None for parts that say their change without the weight."""
    if parts.keys() & {"ia3", "on_input", "ia3_l"}:
        return "IA3, which scales rows or columns of the weight"
    if any(part in parts for part in _GLORA):
        return "GLoRA, which multiplies the weight"
    if PARTS & parts.keys():
        blocks = parts.get("oft_blocks")
        return f"{'B' * (blocks is not None and blocks.dim() == 4)}OFT, which rotates the weight"
    return "the change of a bias alone" if parts.keys() - {"alpha"} == {"delta_bias"} else None


def rewrite(
    module: str, parts: Mapping[Part, Tensor], weight: Tensor | None, bias_before: Tensor | None = None
) -> Dense:
    """Return the change of `weight`, (out, in[, kh, kw]) or (channels,), that these parts make; float32.

    module: named in messages.  bias_before: the bias, (out,), which PEFT's IA3 scales where it scales rows.
    Raises AdapterFileError for parts that are not whole or do not fit the weight.
    """
    if weight is None:
        raise AdapterFileError(
            f"{module}: the model has no such module", mend="--model M, the base that the file was trained on"
        )
    try:
        if parts.keys() - {"alpha"} == {"delta_bias"}:
            return Dense(torch.zeros(weight.shape), parts["delta_bias"].float())
        wide = {part: tensor.double() for part, tensor in parts.items()}
        changed = _changed(wide, weight.double())
        bias = parts.get("delta_bias")
        if "ia3_l" in wide and bias_before is not None and wide["ia3_l"].shape[1] == 1:
            bias = bias_before.double() * (wide["ia3_l"].flatten() - 1)
        return Dense((changed - weight.double()).float(), None if bias is None else bias.float())
    except (KeyError, IndexError, RuntimeError, CompatibilityError) as error:
        shapes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise AdapterFileError(
            f"{module}: {shapes} do not fit the model's weight {tuple(weight.shape)}",
            mend="--model M, the base that the file was trained on",
        ) from error


def _changed(parts: Mapping[Part, Tensor], weight: Tensor) -> Tensor:
    if "ia3_l" in parts:
        if parts["ia3_l"].shape not in ((len(weight), 1), (1, weight.shape[1])):
            raise CompatibilityError("another width")
        return weight * parts["ia3_l"].reshape(*parts["ia3_l"].shape, *[1] * (weight.dim() - 2))
    if "oft_R" in parts:
        return _rotated_inputs(weight, parts["oft_R"])
    if "ia3" in parts:
        scales = 1 + parts["ia3"].flatten()
        dim = 1 if bool(parts["on_input"].any()) else 0
        if len(scales) != weight.shape[dim]:
            raise CompatibilityError("another width")
        return weight * scales.reshape([-1 if place == dim else 1 for place in range(weight.dim())])
    if any(part in parts for part in _GLORA):
        return weight + _glora(parts, weight)
    # kohya splits fused rows (q, k, v) and gives each part blocks of its own; a lone tensor is for all rows.
    given = [parts[part] for part in _OFT if part in parts]
    limit = float(parts["alpha"]) if "alpha" in parts else 0.0
    if "oft_diag" in parts:
        rotated = _rotated(weight, parts["oft_diag"])
    elif given[0].dim() == 4:
        rotated = _interleaved(weight, _rotations(given[0], limit * len(weight)))
    else:
        sizes = [blocks.shape[0] * blocks.shape[1] for blocks in given]
        rows = zip(weight.split(sizes), given, strict=True)
        rotated = torch.cat([_rotated(part, _rotations(blocks, limit * len(part))) for part, blocks in rows])
    return rotated * parts["rescale"].reshape(-1, *[1] * (weight.dim() - 1)) if "rescale" in parts else rotated


def _rotations(blocks: Tensor, limit: float) -> Tensor:
    """Return R for each block; blocks: (..., n, n).  limit: of the norm of all Q together, 0 for none."""
    skew = blocks - blocks.transpose(-1, -2)
    norm = float(skew.norm())
    if limit > 0 and norm > limit:
        skew = skew * (limit / norm)
    unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    inverse: Tensor = torch.linalg.inv(unit - skew)
    return (unit + skew) @ inverse


def _rotated(weight: Tensor, rotations: Tensor) -> Tensor:
    count, size, _ = rotations.shape
    parts = weight.reshape(count, size, -1)
    return torch.einsum("knm,knp->kmp", rotations, parts).reshape(weight.shape)


def _rotated_inputs(weight: Tensor, rotations: Tensor) -> Tensor:
    """Rotate the inputs in blocks; rotations: (blocks, n, n), or (1, n, n) for all blocks alike."""
    if weight[0, 0].numel() > 1:
        raise CompatibilityError("PEFT's OFT of a convolution is no change of its weight")
    columns = weight.flatten(1).unflatten(1, (-1, rotations.shape[-1]))
    rotations = rotations.expand(columns.shape[1], -1, -1)
    return torch.einsum("obn,bmn->obm", columns, rotations).reshape(weight.shape)


def _interleaved(weight: Tensor, rotations: Tensor) -> Tensor:
    """Apply BOFT's factors, the first one first; rotations: (factors, blocks, n, n)."""
    size = rotations.shape[-1]
    rows = weight.flatten(1)
    for step, factor in enumerate(rotations):
        apart = 2**step * (size // 2)
        mixed = rows.reshape(-1, 2, apart, rows.shape[1]).transpose(1, 2).reshape(-1, size, rows.shape[1])
        mixed = torch.einsum("bij,bjp->bip", factor, mixed)
        rows = mixed.reshape(-1, apart, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    return rows.reshape(weight.shape)


def _glora(parts: Mapping[Part, Tensor], weight: Tensor) -> Tensor:
    a1, a2, b1, b2 = (parts[part].flatten(1) for part in _GLORA)
    # LyCORIS once had the two factors of each product the other way round.
    if not (a1.shape[1] == len(a2) == b1.shape[1] == len(b2)):
        a1, a2, b1, b2 = a2, a1, b2, b1
    rank = len(a2)
    through = torch.einsum("oi...,ij->oj...", weight, a1 @ a2)
    scale = float(parts["alpha"]) / rank if "alpha" in parts else 1.0
    return ((b1 @ b2).reshape(weight.shape) + through) * scale
