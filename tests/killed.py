"""Work that kills its worker in the middle, for tests of runners."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spm_hub.io.runners.runner import Place, Runner, Say, Work


@dataclass(frozen=True)
class KilledOnce:
    """Work whose first worker to come to this piece kills itself when the piece is done; `mark` is left."""

    work: Work
    piece: Any
    mark: Path

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[Any], Any]]:
        with self.work.open(place) as do:

            def do_or_die(piece: Any) -> Any:
                result = do(piece)
                if piece == self.piece and not self.mark.exists():
                    self.mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            yield do_or_die


@dataclass(frozen=True)
class Killing:
    """A runner one of whose workers is killed at its second piece."""

    runner: Runner
    mark: Path

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        yield from self.runner.run(KilledOnce(work, pieces[1], self.mark), pieces, say)
