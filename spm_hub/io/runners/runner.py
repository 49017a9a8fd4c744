"""The interface of runners and of their work, and the runner of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from spm_hub.errors import SpmHubError

Say = Callable[[str], None]
"""Receives remarks for a person."""

MOST_LOSSES = 3
"""So many workers may be lost over one piece; after that the piece is taken to be the cause."""


class WorkerLostError(SpmHubError):
    """A piece of work over which one worker after the other was lost."""


@dataclass(frozen=True)
class Place:
    """Which worker this is, from 0, of how many on this machine."""

    worker: int = 0
    workers: int = 1

    def device(self, wanted: object) -> Any:
        """Return the device for this worker: the GPUs in turn where several workers share a machine's."""
        import torch

        count = torch.cuda.device_count()
        if self.workers > 1 and count > 1 and str(wanted) in ("None", "auto", "cuda"):
            return f"cuda:{self.worker % count}"
        return wanted


class Work(Protocol):
    """Work in pieces.

    For workers in other processes it can be pickled, and loads all that is large in `open`.
    """

    def open(self, place: Place) -> AbstractContextManager[Callable[[Any], Any]]:
        """Load what the pieces share, once for each worker; the function does one piece.

        It returns the result of the piece, which depends on the piece alone, so that any worker may do it, and again.
        Pieces and results can be pickled.
        """


class Runner(Protocol):
    """Does pieces of work."""

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        """Yield the number of each piece and its result, as they are done.

        Errors of a piece are raised here. Raises WorkerLostError.
        """


@dataclass(frozen=True)
class Serial:
    """Does the pieces one after the other in this process."""

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        """Yield the number of each piece and its result, in order."""
        if not pieces:
            return
        with work.open(Place()) as do:
            for number, piece in enumerate(pieces):
                yield number, do(piece)


def refuse_the_piece(piece: Any, reason: str) -> WorkerLostError:
    """Return the error for a piece over which too many workers were lost."""
    return WorkerLostError(
        f"{MOST_LOSSES} workers were lost over one piece of work, {piece!r}: {reason}",
        mend="fewer --workers, or smaller batches with --at-once: most often there was too little memory",
    )
