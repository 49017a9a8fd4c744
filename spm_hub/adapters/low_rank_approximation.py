"""Approximates an eraser by one of lower rank, as a LoRA can hold it, and measures the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import UsageError
from spm_hub.io.progress import Progress, no_progress


@dataclass(frozen=True)
class Truncation:
    """A low-rank approximation, its error, and the number of biases and norms that it leaves out.

    relative_error: sqrt(sum |dW - dW_r|^2 / sum |dW|^2) over all changed weights and biases.
    """

    adapter: Adapter
    relative_error: float
    biases_left_out: int


def truncate(adapter: Adapter, rank: int, progress: Progress = no_progress) -> Truncation:
    """Return the nearest adapter of at most `rank` in every module (Eckart and Young 1936), and its error.

    The scale of a norm has no rank; it is left out as biases are, and both count in the error.
    Raises UsageError for a mask, which changes known weights only and has no rank of its own, and for norms alone.
    """
    truncated: dict[str, Increment] = {}
    missed = whole = 0.0
    biases = 0
    for count, (path, increment) in enumerate(adapter.increments.items()):
        progress(count + 1, len(adapter.increments))
        if isinstance(increment, Mask):
            raise UsageError(f"{adapter.name} switches neurons off, which has no rank", mend="--model M makes it dense")
        if isinstance(increment, Dense) and increment.delta.dim() == 1:
            lost = float(increment.delta.double().square().sum())
            missed, whole, biases = missed + lost, whole + lost, biases + 1
        else:
            truncated[path] = near = _nearest_of_rank(increment, rank)
            missed += 0.0 if near is increment else _square(increment, near)
            whole += _square(increment)
        if isinstance(increment, Dense) and increment.delta_bias is not None:
            biases += 1
            lost = float(increment.delta_bias.double().square().sum())
            missed, whole = missed + lost, whole + lost
    if not truncated:
        raise UsageError(f"{adapter.name} changes norms only, which have no rank", mend="leave --svd-rank out")
    error = (missed / whole) ** 0.5 if whole else 0.0
    smaller = adapter.with_increments(truncated)
    recipe = {**smaller.manifest.recipe, "svd": {"rank": rank, "relative_error": error, "biases_left_out": biases}}
    manifest = smaller.manifest.model_copy(update={"recipe": recipe})
    return Truncation(Adapter(manifest, smaller.increments, adapter.source), error, biases)


def _square(increment: LowRank | Dense, less: LowRank | None = None) -> float:
    """Return |dW|^2 of the change, or of its difference to `less`.

    For a product it is computed from the factors, as a file of megabytes can hold the factors of terabytes.
    """
    if isinstance(increment, Dense):
        delta = increment.delta.to(torch.float64, copy=True).flatten(1)
        if less is not None:
            delta -= less.up.double().flatten(1) @ less.down.double().flatten(1)
        return float(delta.square_().sum())
    up, down = increment.up.flatten(1), increment.down.flatten(1)
    if less is not None:
        up = torch.cat([up, -less.up.flatten(1)], 1)
        down = torch.cat([down, less.down.flatten(1)])
    return float((_core(up) @ _core(down.T).T).square().sum())


def _core(columns: Tensor) -> Tensor:
    """Return the triangle R of a QR decomposition, with the lengths and angles of `columns`; float64."""
    triangle: Tensor = torch.linalg.qr(columns.double(), mode="r").R
    return triangle


def _nearest_of_rank(increment: LowRank | Dense, rank: int) -> LowRank:
    shape = increment.weight_shape
    if isinstance(increment, LowRank):
        if increment.rank <= rank:
            return increment
        # Rotations change no distance between matrices: only the small core between two of them has to be cut.
        left, core_up = torch.linalg.qr(increment.up.double().flatten(1))
        right, core_down = torch.linalg.qr(increment.down.double().flatten(1).T)
        up, down = _cut(core_up @ core_down.T, rank)
        up, down = left @ up, down @ right.T
    else:
        up, down = _cut(increment.delta.flatten(1), rank)
    rank = len(down)
    return LowRank(
        down.reshape(rank, *shape[1:]).float().contiguous(),
        up.reshape(shape[0], rank, *[1] * (len(shape) - 2)).float().contiguous(),
    )


def _cut(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return up and down of the nearest matrix to `delta` of at most that rank, both of equal magnitude."""
    rank = min(rank, *delta.shape)
    # Eigenvectors of the smaller Gram matrix: a wide convolution's SVD costs twenty times as much. They alone take four
    # times the memory of `delta` in float64, which is why that is computed again afterwards.
    tall = len(delta) > delta.shape[1]
    matrix = delta.T if tall else delta
    values, vectors = torch.linalg.eigh(matrix.double() @ matrix.T.double())
    lead = vectors[:, -rank:]
    other = lead.T @ matrix.double()
    up, down = (other.T, lead.T) if tall else (lead, other)
    # Neither half then overflows nor vanishes in half precision.
    share = values[-rank:].clamp_min(0).pow(0.25)
    share = torch.where(share > 0, share, torch.ones_like(share))
    return (up / share, down * share[:, None]) if tall else (up * share, down / share[:, None])
