"""A display is opened only for work that takes long."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest

from spm_hub.io import progress
from spm_hub.io.progress import Bars, Progress, progress_if_long


class Told:
    """A reporter that writes down what it is told."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def say(self, text: str) -> None:
        self.events.append(text)

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        self.events.append(label)

        def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
            self.events.append((step, total))

        yield move
        self.events.append("closed")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_short_work_shows_nothing(clock: list[float]) -> None:
    told = Told()
    with progress_if_long(told, "encoding") as move:
        move(1, 3)
        clock[0] += 0.9
        move(2, 3)
        clock[0] += 5
        move(3, 3)  # it took long, and is done
    assert told.events == []


def test_long_work_is_shown_from_then_on_and_closed(clock: list[float]) -> None:
    told = Told()
    with progress_if_long(told, "encoding") as move:
        move(1, 4)
        clock[0] += 1.0
        move(2, 4)
        move(3, 4)
        move(4, 4)
    assert told.events == ["encoding", (2, 4), (3, 4), (4, 4), "closed"]


def test_a_function_gets_the_steps(clock: list[float]) -> None:
    steps: list[tuple[int, int]] = []
    with progress_if_long(Bars(lambda step, total, info: steps.append((step, total))), "encoding", after=0) as move:
        move(1, 2)
        move(2, 2)
    assert steps == [(1, 2), (2, 2)]
