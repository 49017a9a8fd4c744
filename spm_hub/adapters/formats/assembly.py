"""Makes a module's increment from its parts, which may come from any file."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.formats import products
from spm_hub.adapters.formats.slots import Part
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import GET_AGAIN, AdapterFileError, CompatibilityError


def assemble(module: str, parts: Mapping[Part, Tensor]) -> Increment:
    """Return one module's increment.

    Raises AdapterFileError that names the module and its wrong or missing part.
    """
    try:
        match sorted(parts):
            case ["down", "up"]:
                return LowRank(_floating(parts["down"]), _floating(parts["up"]))
            case ["alpha", "down", "up"]:
                return _scaled(LowRank(_floating(parts["down"]), _floating(parts["up"])), parts["alpha"])
            case ["down", "mid", "up"] | ["alpha", "down", "mid", "up"]:
                down = products.through(_floating(parts["mid"]), _floating(parts["down"])).float()
                pair = LowRank(down, _floating(parts["up"]))
                return _scaled(pair, parts["alpha"]) if "alpha" in parts else pair
            case ["delta"] | ["delta", "delta_bias"]:
                bias = parts.get("delta_bias")
                return Dense(_floating(parts["delta"]), None if bias is None else _floating(bias))
            case ["keep_out"]:
                return Mask(_switches(parts["keep_out"]), 0)
            case ["keep_in"]:
                return Mask(_switches(parts["keep_in"]), 1)
            case [*names] if products.FACTORS.issuperset(factors := set(names) - {"alpha"}) and factors:
                alpha = parts.get("alpha")
                scale = None if alpha is None or alpha.is_meta else _number(alpha)
                given = {part: _floating(parts[part]) for part in products.FACTORS & parts.keys()}
                return Dense(products.product(given, scale))
            case names:
                raise CompatibilityError(
                    f"{' + '.join(names)} is no increment: it takes down + up, delta, keep_out or keep_in"
                )
    except CompatibilityError as error:
        raise AdapterFileError(f"{module}: {error.message}", mend=GET_AGAIN) from error


def of_one_kind(increments: Mapping[str, Increment]) -> dict[str, Increment]:
    """Return the same changes, all of them dense if some are, since an adapter is of one kind.

    Masks are unchanged. Raises AdapterFileError as `dense` does.
    """
    if not any(isinstance(increment, Dense) for increment in increments.values()):
        return dict(increments)
    return {path: one if isinstance(one, Mask) else dense(path, one) for path, one in increments.items()}


def dense(module: str, increment: LowRank | Dense) -> Dense:
    """Return the change as a dense one. Raises AdapterFileError if it is larger than any weight."""
    if isinstance(increment, Dense):
        return increment
    try:
        products.check_size(math.prod(increment.weight_shape))
    except CompatibilityError as error:
        raise AdapterFileError(f"{module}: {error.message}", mend=GET_AGAIN) from error
    return Dense(increment.delta_for(torch.empty(increment.weight_shape, device="meta")))


def _floating(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        raise CompatibilityError(f"{tensor.dtype} is not a dtype of increments (float16, bfloat16, float32, float64)")
    return tensor


def _switches(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.uint8, torch.bool) or (not tensor.is_meta and bool((tensor > 1).any())):
        raise CompatibilityError("a mask holds zeros and ones as uint8")
    return tensor.bool()


def _number(alpha: Tensor) -> float:
    if alpha.numel() != 1 or not torch.isfinite(alpha).all() or float(alpha) == 0.0:
        raise CompatibilityError(f"alpha must be one finite number other than 0, not {alpha.tolist()}")
    return float(alpha)


def _scaled(increment: LowRank, alpha: Tensor) -> LowRank:
    """Fold alpha / rank into `up`; if that would round, the increment becomes float32."""
    if increment.up.is_meta:
        return increment
    scale = _number(alpha) / increment.rank
    if scale == 1.0:
        return increment
    exact = increment.up.double() * scale
    up = exact.to(increment.up.dtype)
    if torch.equal(up.double(), exact):
        return LowRank(increment.down, up)
    wide = torch.promote_types(increment.dtype, torch.float32)
    return LowRank(increment.down, exact).to(dtype=wide)
