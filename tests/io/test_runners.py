"""Runners do every piece once, also when workers are killed, and hand on the errors of pieces."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from spm_hub.errors import UsageError
from spm_hub.io.runners.named import runner_named
from spm_hub.io.runners.on_ray import OnRay, share_of_cluster
from spm_hub.io.runners.processes import Processes
from spm_hub.io.runners.runner import Place, Serial, WorkerLostError


@dataclass(frozen=True)
class Squares:
    """Squares numbers. Each opening leaves a file; a number below 0 kills the worker once, and -9 always."""

    folder: Path

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[int], int]]:
        (self.folder / f"opened-{os.getpid()}").touch()

        def square(number: int) -> int:
            if number == 13:
                raise UsageError("13 has no square", mend="another number")
            if number < 0 and (number == -9 or not (self.folder / f"killed-{number}").exists()):
                (self.folder / f"killed-{number}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return number * number

        yield square


def opened(folder: Path) -> int:
    return len(list(folder.glob("opened-*")))


def test_processes_do_every_piece_and_open_once_each(tmp_path: Path) -> None:
    said: list[str] = []
    numbers = [1, 2, -3, 4, 5, 6]
    done = dict(Processes(2).run(Squares(tmp_path), numbers, said.append))
    assert done == {place: number * number for place, number in enumerate(numbers)}
    assert said == ["a worker was lost (SIGKILL); another one takes its place"]
    assert opened(tmp_path) in (2, 3), "the one that replaces the lost one may come too late for a piece"
    with pytest.raises(UsageError, match="13 has no square") as caught:
        list(Processes(1).run(Squares(tmp_path), [13], said.append))
    assert caught.value.mend == "another number"


def test_a_piece_that_kills_every_worker_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(WorkerLostError, match="3 workers were lost over one piece of work, -9: SIGKILL"):
        list(Processes(1).run(Squares(tmp_path), [-9], lambda text: None))


def test_serial_is_in_order_and_opens_nothing_for_nothing(tmp_path: Path) -> None:
    assert list(Serial().run(Squares(tmp_path), [], lambda text: None)) == []
    assert opened(tmp_path) == 0
    assert list(Serial().run(Squares(tmp_path), [3, 4], lambda text: None)) == [(0, 9), (1, 16)]


def test_ray_does_every_piece_although_a_worker_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="the extra ray is not installed: pip install 'spm-hub[ray]'")
    numbers, said = [1, 2, -3, 4, 5, 6], list[str]()
    done = dict(OnRay(2).run(Squares(tmp_path), numbers, said.append))
    assert done == {place: number * number for place, number in enumerate(numbers)}
    assert said == ["a worker was lost; another one takes its place"]
    assert capfd.readouterr().out == "", "with --json, what the command writes to stdout is one JSON value"
    with pytest.raises(UsageError, match="13 has no square"):
        list(OnRay(1).run(Squares(tmp_path), [13], lambda text: None))


@pytest.mark.parametrize("gpus", [0, 1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 8])
def test_all_workers_of_a_cluster_find_a_place(gpus: int, workers: int) -> None:
    asked = share_of_cluster({"CPU": 4.0, **({"GPU": float(gpus)} if gpus else {})}, workers)
    assert 4 * int(1 / asked["num_cpus"] + 1e-9) >= workers
    assert ("num_gpus" in asked) == (gpus > 0)
    if gpus:
        assert gpus * int(1 / asked["num_gpus"] + 1e-9) >= workers
        assert asked["num_gpus"] == 1.0 or gpus < workers, "none is shared while another is free"


@pytest.mark.parametrize(
    ("text", "workers", "words"),
    [
        ("process", None, "did you mean processes"),
        ("processes:2", None, "there is no runner"),
        ("ray:", None, "there is no runner"),
        ("serial", 2, "--workers 2 has no effect"),
        ("processes", 0, "--workers is 0"),
    ],
)
def test_runners_that_do_not_exist(text: str, workers: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        runner_named(text, workers)
    assert runner_named("ray:10.0.0.1:6379", 3) == OnRay(3, "10.0.0.1:6379")
