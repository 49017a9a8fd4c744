"""Trains the plans of a session in workers, each with a base of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from spm_hub.errors import UsageError
from spm_hub.io.progress import Bars, Progress
from spm_hub.io.runners.runner import Place, Runner
from spm_hub.registry.entry import EraserEntry
from spm_hub.training.session import Session


@dataclass
class Heard:
    """A reporter that keeps remarks, for the process that asked for the work."""

    remarks: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.remarks.append(text)

    def progress(self, label: str) -> AbstractContextManager[Progress]:
        return Bars(shown=False).progress(label)


@dataclass(frozen=True)
class Trainings:
    """The work of a session.

    A piece is the number of a plan; its result has the names of the erasers, and remarks.
    session: one whose parts can be pickled, with a registry that every worker sees under its path.
    """

    session: Session

    @contextmanager
    def open(self, place: Place) -> Iterator[Callable[[int], tuple[list[str], list[str]]]]:
        """Load the base on the worker's device; yield the function that trains one plan."""
        heard = Heard()
        base = replace(self.session.base, device=place.device(self.session.base.device))
        session = replace(self.session, base=base, reporter=heard)
        with session.opened() as train:

            def train_one(number: int) -> tuple[list[str], list[str]]:
                heard.remarks.clear()
                made = train(session.plans[number])
                return [one.name for one in made], list(heard.remarks)

            yield train_one


def train_elsewhere(session: Session, runner: Runner) -> tuple[EraserEntry, ...]:
    """Train all erasers of a checked session by workers; return their entries in order.

    Raises UsageError for a session without a registry or of a given pipeline, and as `Session.train` does.
    """
    if session.registry is None or session.base.pipe is not None:
        raise UsageError(
            "workers load the base themselves and keep erasers in a registry, which is not given",
            mend="a registry, and the base by its name",
        )
    session.check_before_loading()
    named: dict[int, list[str]] = {}
    with session.reporter.progress("erasers") as progress:
        work = Trainings(replace(session, reporter=Bars(shown=False)))
        for number, (names, remarks) in runner.run(work, range(len(session.plans)), session.reporter.say):
            named[number] = names
            for remark in remarks:
                session.reporter.say(remark)
            progress(len(named), len(session.plans))
    return tuple(session.registry.get(name) for number in sorted(named) for name in named[number])
