"""Makes a module's increment from its parts, which may come from any file."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spm_hub.adapters.formats import products
from spm_hub.adapters.formats.eight_bit import widened
from spm_hub.adapters.formats.slots import Part
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import GET_AGAIN, AdapterFileError, CompatibilityError

ADDED: frozenset[Part] = frozenset(("delta_bias", "up_bias", "bias_indices", "bias_values", "bias_size"))
"""Parts that come in addition to a weight's change, and make a pair of thin factors dense."""


def assemble(module: str, parts: Mapping[Part, Tensor]) -> Increment:
    """Return one module's increment.

    Raises AdapterFileError that names the module and its wrong or missing part.
    """
    try:
        alpha = parts.get("alpha")
        match sorted(parts.keys() - ADDED - {"alpha"}):
            case ["down", "up"]:
                change: Increment = _scaled(LowRank(_floating(parts["down"]), _floating(parts["up"])), alpha)
            case ["down", "mid", "up"]:
                down = products.through(_floating(parts["mid"]), _floating(parts["down"])).float()
                change = _scaled(LowRank(down, _floating(parts["up"])), alpha)
            case ["delta"]:
                # The programs that write an alpha next to a full change do not scale by it.
                change = Dense(_floating(parts["delta"]))
            case ["keep_out"] if len(parts) == 1:
                change = Mask(_switches(parts["keep_out"]), 0)
            case ["keep_in"] if len(parts) == 1:
                change = Mask(_switches(parts["keep_in"]), 1)
            case [*names] if names and products.FACTORS.issuperset(names):
                given = {part: _floating(parts[part]) for part in products.FACTORS & parts.keys()}
                change = Dense(products.product(given, None if alpha is None or alpha.is_meta else _number(alpha)))
            case _:
                raise CompatibilityError(
                    f"{' + '.join(sorted(parts))} is no increment: it takes down + up, delta, keep_out or keep_in"
                )
        return _with_added(module, change, parts)
    except CompatibilityError as error:
        raise AdapterFileError(f"{module}: {error.message}", mend=error.mend or GET_AGAIN) from error


def _with_added(module: str, change: Increment, parts: Mapping[Part, Tensor]) -> Increment:
    """Return the change with the parts of `ADDED`: a dense one if there are any."""
    if isinstance(change, Mask) or not (ADDED & parts.keys()):
        return change
    whole = dense(module, change)
    delta, bias = whole.delta, parts.get("delta_bias")
    if "up_bias" in parts:
        # It belongs to the second factor, and is scaled like it.
        moved = _floating(parts["up_bias"]).double()
        if isinstance(change, LowRank) and (alpha := parts.get("alpha")) is not None and not alpha.is_meta:
            moved = moved * (_number(alpha) / change.rank)
        bias = moved.float() if bias is None else bias + moved.float()
    if sparse := {part: parts[part] for part in ("bias_indices", "bias_values", "bias_size") if part in parts}:
        delta = delta + _sparse(sparse, delta)
    return Dense(delta, None if bias is None else _floating(bias))


def _sparse(parts: Mapping[str, Tensor], delta: Tensor) -> Tensor:
    """Return the few entries that LyCORIS' extraction keeps next to a product; shaped like `delta`."""
    if len(parts) < 3:
        raise CompatibilityError(f"{' + '.join(parts)} are not all three of bias_indices, bias_values and bias_size")
    indices, values = parts["bias_indices"].long(), _floating(parts["bias_values"]).float()
    rows, columns = len(delta), delta[0].numel()
    fits = indices.dim() == 2 and len(indices) == 2 and indices.shape[1] == len(values)
    if not fits or parts["bias_size"].tolist() != [rows, columns]:
        raise CompatibilityError(f"a sparse change of {parts['bias_size'].tolist()} for a weight ({rows}, {columns})")
    # Kept as 16-bit numbers, which are negative from 32768 on.
    indices = torch.where(indices < 0, indices + 2**16, indices)
    if indices.numel() and bool((indices.amax(1) >= torch.tensor([rows, columns])).any()):
        raise CompatibilityError(f"a sparse change beyond the weight's ({rows}, {columns})")
    return torch.zeros(rows, columns).index_put_(tuple(indices), values, accumulate=True).reshape(delta.shape)


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
    if not tensor.is_floating_point():
        raise CompatibilityError(
            f"{tensor.dtype} is not a dtype of increments (float16, bfloat16, float32, float64)",
            mend="ask its author for a float16 version",
        )
    return widened(tensor)


def _switches(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.uint8, torch.bool) or (not tensor.is_meta and bool((tensor > 1).any())):
        raise CompatibilityError("a mask holds zeros and ones as uint8")
    return tensor.bool()


def _number(alpha: Tensor) -> float:
    """Return alpha. It is 0 in files whose writer switched a module off; its change is then zero."""
    if alpha.numel() != 1 or not torch.isfinite(widened(alpha)).all():
        raise CompatibilityError(f"alpha must be one finite number, not {str(alpha.tolist())[:120]}")
    return float(alpha)


def _scaled(increment: LowRank, alpha: Tensor | None) -> LowRank:
    """Fold alpha / rank into `up`; if that would round, the increment becomes float32."""
    if increment.up.is_meta or alpha is None:
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
