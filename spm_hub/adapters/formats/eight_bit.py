"""Widens eight-bit floats, with or without a scale for each tensor, and rounds to them.

Half precision holds every finite number of both kinds (e4m3fn, e5m2) exactly. ComfyUI keeps the scale of `X.weight` as
`X.scale_weight` next to an empty `scaled_fp8`, others as `X.weight_scale`: the weight is the product of the two.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.errors import AdapterFileError

_SCALE = re.compile(r"(?P<module>.+)\.(?:scale_weight|weight_scale)")
# A mark of the whole file, and the scales of inputs, which no weight depends on.
_UNUSED = re.compile(r"(?:.+\.)?(?:scaled_fp8|scale_input|input_scale)")


def is_eight_bit(tensor: Tensor) -> bool:
    """Return True for floats of eight bits."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def split_scales(source: object, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors without scales, and each scale by the key of its weight.

    Raises AdapterFileError for a scale that does not fit its weight: one number, or one for each row.
    """
    scales: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    quantised = any(map(is_eight_bit, tensors.values()))
    for key, tensor in tensors.items():
        match = _SCALE.fullmatch(key) if quantised else None
        of = f"{match['module']}.weight" if match else ""
        if of in tensors and is_eight_bit(tensors[of]):
            rows = len(tensors[of]) if tensors[of].dim() else 1
            if tensor.numel() not in (1, rows):
                raise AdapterFileError(
                    f"{source}: {key} has {tuple(tensor.shape)} scales for a weight {tuple(tensors[of].shape)}",
                    mend="ask its author for a float16 version",
                )
            scales[of] = tensor
        elif not (quantised and _UNUSED.fullmatch(key)):
            rest[key] = tensor
    return rest, scales


def widened(tensor: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return eight-bit floats in float16, or times their scale in float32; other tensors are unchanged."""
    if not is_eight_bit(tensor):
        return tensor
    return tensor.half() if scale is None else tensor.float() * _for_rows(scale, tensor)


def rounded_as(original: Tensor, stored: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return `original` as a file holds it that keeps this tensor as `stored`; in the shape of `stored`."""
    original = original.reshape(stored.shape)
    if not is_eight_bit(stored):
        return original.to(stored.dtype)
    small = original.float() if scale is None else original.float() / _for_rows(scale, stored)
    limit = torch.finfo(stored.dtype).max
    return widened(small.clamp(-limit, limit).to(stored.dtype), scale)


def _for_rows(scale: Tensor, tensor: Tensor) -> Tensor:
    scale = scale.float()
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, *[1] * (tensor.dim() - 1))
