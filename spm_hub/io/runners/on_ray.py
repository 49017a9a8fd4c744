"""The runner of a Ray cluster, local or of several machines."""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from spm_hub.errors import NotFoundError, SpmHubError, UsageError
from spm_hub.io.runners.runner import MOST_LOSSES, Place, Say, Work, WorkerLostError, refuse_the_piece

INSTALL = "pip install 'spm-hub[ray]'"


@dataclass(frozen=True)
class OnRay:
    """Does the pieces in actors of a Ray cluster, each with its own copy of what `Work.open` loads.

    workers: number of actors. address: of a cluster that runs, "auto" for the one of this machine; None starts one on
    this machine and ends it.
    Every machine has the same packages, and sees the run's folder under the same path. An actor that dies costs the
    piece that it had, which another one does again. Actors have a GPU each, or share them if there are fewer.
    """

    workers: int
    address: str | None = None

    def run(self, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        """Yield the number of each piece and its result, as they are done.

        Raises WorkerLostError; NotFoundError without Ray, UsageError for an address where no cluster is.
        """
        ray = _ray()
        with _cluster(ray, self.address, say):
            yield from self._run(ray, work, pieces, say)

    def _run(self, ray: Any, work: Work, pieces: Sequence[Any], say: Say) -> Iterator[tuple[int, Any]]:
        size = min(self.workers, len(pieces))
        shared = ray.put(work)
        options = share_of_cluster(ray.cluster_resources(), size)

        def start() -> Any:
            return ray.remote(_Actor).options(**options).remote(shared, _threads())

        waiting, losses = deque(range(len(pieces))), Counter[int]()
        busy: dict[Any, tuple[int, Any]] = {}
        for _ in range(size):
            number, actor = waiting.popleft(), start()
            busy[actor.do.remote(pieces[number])] = number, actor
        while busy:
            (done, *_), _ = ray.wait(list(busy), num_returns=1)
            number, actor = busy.pop(done)
            try:
                value = ray.get(done)
            except ray.exceptions.RayActorError as error:
                losses[number] += 1
                if losses[number] >= MOST_LOSSES:
                    raise refuse_the_piece(pieces[number], str(error).splitlines()[0]) from None
                say("a worker was lost; another one takes its place")
                waiting.appendleft(number)
                actor = start()
            except ray.exceptions.ActorUnschedulableError as error:
                raise WorkerLostError(
                    f"Ray starts no worker: {str(error).strip().splitlines()[0]}",
                    mend="fewer --workers, or --runner processes",
                ) from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, SpmHubError) else error from None
            else:
                yield number, value
            if waiting:
                following = waiting.popleft()
                busy[actor.do.remote(pieces[following])] = following, actor


class _Actor:
    """A worker. It loads what the pieces share with its first piece, so that errors of that are raised."""

    def __init__(self, work: Work, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._work, self._stack = work, ExitStack()
        self._do: Callable[[Any], Any] | None = None

    def do(self, piece: Any) -> Any:
        if self._do is None:
            # Ray shows an actor its own GPUs only, so there is no choice of devices here.
            self._do = self._stack.enter_context(self._work.open(Place()))
        return self._do(piece)


class _cluster:  # noqa: N801
    """Connects to a cluster, or starts one, for a `with` block; one that runs already is left alone."""

    def __init__(self, ray: Any, address: str | None, say: Say) -> None:
        self._ray, self._address, self._say = ray, address, say
        self._ours = not ray.is_initialized()

    def __enter__(self) -> None:
        if not self._ours:
            return
        options: dict[str, Any] = {}
        if self._address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # unless asked for: it reports to Ray's makers
            # A worker that imports torch on a busy machine is not dead after Ray's minute.
            os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
            # The workers import what this process can: also what a program has added to its path. There is no page of
            # progress, which would take seconds to start and end with the cluster.
            paths = os.pathsep.join(path for path in sys.path if path)
            options = {"num_cpus": max(2, os.cpu_count() or 1), "include_dashboard": False,
                       "runtime_env": {"env_vars": {"PYTHONPATH": paths}}}  # fmt: skip
        _silence(self._ray, silent=True)
        try:
            context = self._ray.init(
                address=self._address or "local", log_to_driver=False, logging_level=logging.ERROR, **options
            )
        except Exception as error:  # Ray has no class of its own for a node that does not start
            _silence(self._ray, silent=False)
            what = "no cluster starts on this machine" if self._address is None else f"no cluster at {self._address}"
            mend = "--runner processes" if self._address is None else "ray start --head, or --runner ray"
            raise UsageError(f"Ray: {what}: {str(error).splitlines()[0]}", mend=mend) from error
        if context.dashboard_url:
            self._say(f"Ray's dashboard: http://{context.dashboard_url}")

    def __exit__(self, *_: object) -> None:
        if self._ours:
            self._ray.shutdown()
            _silence(self._ray, silent=False)


def _silence(ray: Any, *, silent: bool) -> None:
    """Keep Ray from writing about lost workers to stdout, where --json writes.

    Our own remarks say that one was lost. `log_to_driver` does not concern these, and Ray has no other setting.
    """
    ray._private.worker._worker_logs_enabled = not silent


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise NotFoundError("--runner ray needs the package ray, which is not installed", mend=INSTALL) from error
    return ray


def share_of_cluster(there: Mapping[str, float], workers: int) -> dict[str, float]:
    """Return what each actor asks for, so that all of them find a place.

    That is a core, and a GPU if there are any. there: the resources of the cluster, "CPU" and "GPU". Where there are
    fewer than workers, some share one.
    """
    wanted = {"num_cpus": there.get("CPU", 1.0), "num_gpus": there.get("GPU", 0.0)}
    return {name: 1.0 / math.ceil(workers / count) for name, count in wanted.items() if count}


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() else 1
