"""The runner of several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from spm_hub.errors import SpmHubError
from spm_hub.io.runners.runner import MOST_LOSSES, Place, Say, Work, refuse_the_piece


@dataclass(frozen=True)
class Processes:
    """Does the pieces in `workers` processes, each with its own copy of what `Work.open` loads.

    A process that dies costs the piece that it had, which another one does again. The cores are shared out between the
    processes, unless OMP_NUM_THREADS says how many threads each has; sums of floats may depend on that number.
    """

    workers: int

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        """Yield the number of each piece and its result, as they are done. Raises WorkerLostError."""
        team = _Team(work, min(self.workers, len(pieces)))
        waiting, losses = deque(range(len(pieces))), Counter[int | None]()
        try:
            for place in range(team.size):
                team.start(place)
            left = len(pieces)
            while left:
                for worker in team.answered():
                    try:
                        error, value = worker.connection.recv()
                    except (EOFError, OSError):
                        reason, number = team.bury(worker), worker.piece
                        losses[number] += 1
                        if losses[number] >= MOST_LOSSES:
                            raise refuse_the_piece("loading" if number is None else pieces[number], reason) from None
                        if number is not None:
                            waiting.appendleft(number)
                        say(f"a worker was lost ({reason}); another one takes its place")
                        team.start(worker.place)
                        continue
                    if error is not None:
                        raise error
                    number, worker.piece = worker.piece, None
                    self._give(worker, waiting, pieces)
                    if number is not None:  # None for a worker that has just loaded
                        left -= 1
                        yield number, value
        finally:
            team.end()

    @staticmethod
    def _give(worker: _Worker, waiting: deque[int], pieces: Sequence[Any]) -> None:
        if waiting:
            worker.piece = waiting.popleft()
            with suppress(OSError):  # it has just died: its pipe says so next
                worker.connection.send(pieces[worker.piece])


@dataclass(eq=False)
class _Worker:
    """A process with our end of its pipe. piece: the number of the piece that it has."""

    place: int
    process: BaseProcess
    connection: Connection
    piece: int | None = None


class _Team:
    """The processes that are alive."""

    def __init__(self, work: Work, size: int) -> None:
        self._work, self.size = work, size
        self._workers: list[_Worker] = []
        # Not forks of this process: they would share its locks and GPU contexts. Forks of a server that has imported
        # everything start fast, also in place of a lost one.
        server = "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if server else "spawn")
        if server:
            self._context.set_forkserver_preload([type(work).__module__, "torch"])

    def start(self, place: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._work, Place(place, self.size), _threads(self.size), theirs), daemon=True
        )
        process.start()
        theirs.close()  # so that the death of the process ends the pipe
        self._workers.append(_Worker(place, process, ours))

    def answered(self) -> list[_Worker]:
        """Wait until a worker has said something or has died; return those."""
        ready = wait([worker.connection for worker in self._workers])
        return [worker for worker in self._workers if worker.connection in ready]

    def bury(self, worker: _Worker) -> str:
        """Remove a worker that has died, and return how."""
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join(timeout=60)
        code = worker.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def end(self) -> None:
        for worker in self._workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def _threads(workers: int) -> int:
    """Return the threads of each process."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else max(1, (os.cpu_count() or 1) // workers)


def _serve(work: Work, place: Place, threads: int, connection: Connection) -> None:
    """Do pieces until the pipe ends: the main function of a worker."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    torch.set_num_threads(threads)
    try:
        with work.open(place) as do:
            connection.send((None, None))
            while True:
                piece = connection.recv()
                connection.send((None, do(piece)))
    except EOFError:
        return
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send((error if isinstance(error, SpmHubError) else _told(error), None))


def _told(error: Exception) -> Exception:
    """Return an error that can be pickled, with where it happened."""
    import traceback

    return RuntimeError("".join(traceback.format_exception(error)))
