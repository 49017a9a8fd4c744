"""An eraser of lower rank in place of another: what a LoRA can hold of a dense change, and how far that is off."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.increments import Dense, Increment, LowRank, Mask
from spm_hub.errors import UsageError


@dataclass(frozen=True)
class Reduction:
    """A low-rank approximation: its adapter, how far it is off, and the biases it had to leave out.

    relative_error: sqrt(sum |dW - dW_r|^2 / sum |dW|^2) over all changed weights and biases.
    """

    adapter: Adapter
    relative_error: float
    biases_left_out: int


def _no_progress(step: int, total: int) -> None:
    pass


def reduce(adapter: Adapter, rank: int, progress: Callable[[int, int], None] = _no_progress) -> Reduction:
    """The nearest adapter of at most `rank` in every module (Eckart and Young 1936), with its measured error.

    Raises UsageError for a mask, which is a change of known weights only.
    """
    reduced: dict[str, Increment] = {}
    missed = whole = 0.0
    biases = 0
    for count, (path, increment) in enumerate(adapter.increments.items()):
        progress(count + 1, len(adapter.increments))
        if isinstance(increment, Mask):
            raise UsageError(f"{adapter.name} switches neurons off, which has no rank", mend="--model M makes it dense")
        reduced[path] = near = _nearest_of_rank(increment, rank)
        missed += 0.0 if near is increment else _square(increment, near)
        whole += _square(increment)
        if isinstance(increment, Dense) and increment.delta_bias is not None:
            biases += 1
            lost = float(increment.delta_bias.double().square().sum())
            missed, whole = missed + lost, whole + lost
    error = (missed / whole) ** 0.5 if whole else 0.0
    smaller = adapter.with_increments(reduced)
    recipe = {**smaller.manifest.recipe, "svd": {"rank": rank, "relative_error": error, "biases_left_out": biases}}
    manifest = smaller.manifest.model_copy(update={"recipe": recipe})
    return Reduction(Adapter(manifest, smaller.increments, adapter.source), error, biases)


def _square(increment: LowRank | Dense, less: LowRank | None = None) -> float:
    """|dW|^2 of the change, or of what is left of it without another one.

    Of a product it is taken from the factors: a file of megabytes can hold those of terabytes.
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
    """The triangle that has the same lengths and angles as `columns`; float64."""
    triangle: Tensor = torch.linalg.qr(columns.double(), mode="r").R
    return triangle


def _nearest_of_rank(increment: LowRank | Dense, rank: int) -> LowRank:
    shape = increment.weight_shape
    if isinstance(increment, LowRank):
        if increment.rank <= rank:
            return increment
        # Rotations leave a matrix as near to others as it was: only the small core between two of them has to be cut.
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
    """up and down of the matrix of at most that rank that is nearest to `delta`, both halves of one size."""
    rank = min(rank, *delta.shape)
    # Eigenvectors of the smaller Gram matrix: a wide convolution's SVD costs twenty times as much. They alone take four
    # times what `delta` does in float64, which is why that is made anew afterwards.
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
