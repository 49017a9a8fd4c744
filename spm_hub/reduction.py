"""An eraser of lower rank in place of another: what a LoRA can hold of a dense change, and how far that is off."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spm_hub.adapter import Adapter
from spm_hub.errors import UsageError
from spm_hub.increments import Dense, Increment, LowRank, Mask


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
        delta = _delta(increment)
        reduced[path] = near = _nearest_of_rank(increment, delta, rank)
        missed += float((delta - _delta(near)).square().sum())
        whole += float(delta.square().sum())
        if isinstance(increment, Dense) and increment.delta_bias is not None:
            biases += 1
            lost = float(increment.delta_bias.double().square().sum())
            missed, whole = missed + lost, whole + lost
    error = (missed / whole) ** 0.5 if whole else 0.0
    smaller = adapter.with_increments(reduced)
    recipe = {**smaller.manifest.recipe, "svd": {"rank": rank, "relative_error": error, "biases_left_out": biases}}
    manifest = smaller.manifest.model_copy(update={"recipe": recipe})
    return Reduction(Adapter(manifest, smaller.increments, adapter.source), error, biases)


def _delta(increment: Increment) -> Tensor:
    """The change itself as a matrix, float64: (out, in * kh * kw)."""
    if isinstance(increment, LowRank):
        return increment.up.double().flatten(1) @ increment.down.double().flatten(1)
    assert isinstance(increment, Dense)
    return increment.delta.double().flatten(1)


def _nearest_of_rank(increment: LowRank | Dense, delta: Tensor, rank: int) -> LowRank:
    if isinstance(increment, LowRank) and increment.rank <= rank:
        return increment
    rank = min(rank, *delta.shape)
    # Eigenvectors of the smaller Gram matrix: a wide convolution's SVD costs twenty times as much.
    tall = len(delta) > delta.shape[1]
    matrix = delta.T if tall else delta
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)
    lead = vectors[:, -rank:]
    other = lead.T @ matrix
    up, down = (other.T, lead.T) if tall else (lead, other)
    # Both halves of one size: neither overflows nor vanishes in half precision.
    share = values[-rank:].clamp_min(0).pow(0.25)
    share = torch.where(share > 0, share, torch.ones_like(share))
    up, down = (up / share, down * share[:, None]) if tall else (up * share, down / share[:, None])
    shape = increment.weight_shape
    return LowRank(
        down.reshape(rank, *shape[1:]).float().contiguous(),
        up.reshape(shape[0], rank, *[1] * (len(shape) - 2)).float().contiguous(),
    )
