"""Trains erasers for visitors of the page: one at a time, with losses and pictures as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from spm_hub.adapters.adapter import Adapter, increment_info
from spm_hub.adapters.manifest import Base, Concept, GateDefaults, Manifest, slug
from spm_hub.errors import RegistryError, UsageError
from spm_hub.hub.resolve import resolve
from spm_hub.io.progress import Bars
from spm_hub.page.studio import Studio
from spm_hub.registry.entry import EraserEntry
from spm_hub.registry.registry import registry_for_new
from spm_hub.training.methods import find_method
from spm_hub.training.planning import plan
from spm_hub.training.session import Session, TrainingStep
from spm_hub.training.verdict import verdict

METHODS = ("instant", "spm")
PICTURES = 6
"""Most pictures that are drawn during a training."""
MOST_STEPS = 300
LONGEST_CONCEPT = 60
_GLANCE = 0.2
_SEED = 0
_DRAWING_STEPS = 20
_PREFIX = "in-training-"


@dataclass(frozen=True)
class Progress:
    """A training at a moment.

    losses: (step, name, value) of all steps so far.  pictures: (picture, caption).  name: the finished eraser's,
    "" before.  verdict: how the training went.
    """

    step: int
    total: int
    losses: tuple[tuple[int, str, float], ...] = ()
    pictures: tuple[tuple[Image.Image, str], ...] = ()
    name: str = ""
    verdict: str = ""


@dataclass
class _Lesson:
    """One training in a thread of its own, and its reports."""

    stop: threading.Event = field(default_factory=threading.Event)
    reports: queue.SimpleQueue[TrainingStep | Mapping[str, Any] | EraserEntry | BaseException] = field(
        default_factory=queue.SimpleQueue
    )


class School:
    """Trains erasers one after the other, and keeps them in the studio's registry."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._turn = threading.Lock()
        self._lessons: dict[str, _Lesson] = {}

    def stop(self, visitor: str) -> bool:
        """End a visitor's training after its present step; the eraser is kept as it is then.

        Return whether there is one.
        """
        lesson = self._lessons.get(visitor)
        if lesson is not None:
            lesson.stop.set()
        return lesson is not None

    def train(self, visitor: str, base: str, concept: str, method: str, steps: int) -> Iterator[Progress]:
        """Train an eraser of a concept on a base, and keep it in the registry; yield how far it has come.

        Raises UsageError, RecipeError, RegistryError for a name that is taken, ModelError.
        """
        concept = concept.strip()
        if not concept or len(concept) > LONGEST_CONCEPT:
            raise UsageError(f"the concept has to have 1 to {LONGEST_CONCEPT} characters", mend="a name such as church")
        if method not in METHODS:
            raise UsageError(f"the method is {method!r}; it is one of {', '.join(METHODS)}")
        if slug(concept) in self._studio.names():
            raise RegistryError(f"there is an eraser {slug(concept)} already", mend="use that one, or another concept")
        if visitor in self._lessons:
            raise UsageError("your last training has not ended", mend="stop it first")
        lesson = self._lessons[visitor] = _Lesson()
        try:
            while not self._turn.acquire(timeout=_GLANCE):
                yield Progress(0, 0, verdict="another visitor's training comes first")
                if lesson.stop.is_set():
                    return
            try:
                yield from self._run(lesson, base, concept, method, steps)
            finally:
                self._turn.release()
        finally:
            lesson.stop.set()
            del self._lessons[visitor]

    def _run(self, lesson: _Lesson, base: str, concept: str, method: str, steps: int) -> Iterator[Progress]:
        session = self._session(lesson, base, concept, method, steps)
        session.check()
        now = self._with_picture(Progress(0, steps if _takes_steps(method) else 1), base, concept, None, "without")
        yield now
        thread = threading.Thread(target=_report, args=(session, lesson), daemon=True)
        thread.start()
        try:
            while True:
                try:
                    report = lesson.reports.get(timeout=_GLANCE)
                except queue.Empty:
                    continue
                if isinstance(report, BaseException):
                    raise report
                if isinstance(report, EraserEntry):
                    yield self._finished(now, base, concept, report)
                    return
                now = self._moved(now, base, concept, report)
                yield now
        finally:
            lesson.stop.set()
            thread.join()

    def _session(self, lesson: _Lesson, base: str, concept: str, method: str, steps: int) -> Session:
        def enough(step: TrainingStep) -> bool:
            pictured = step.step % -(-step.total // PICTURES) == 0
            about = {"step": step.step, "total": step.total, "losses": dict(step.losses)}
            lesson.reports.put({**about, "increments": step.increments() if pictured else None})
            return lesson.stop.is_set()

        chosen = self._studio.bases[base]
        recipe: dict[str, Any] = {"model": chosen.reference, "method": method}
        if _takes_steps(method):
            recipe |= {"steps": min(steps, MOST_STEPS), "anchoring": {"per_target": 1}}
        return Session(
            plan(concept, recipe), replace(chosen, pipe=None), Bars(False),
            lambda start: resolve(start, self._studio.registry),
            registry=registry_for_new(self._studio.registry), callbacks=(enough,),
        )  # fmt: skip

    def _moved(self, now: Progress, base: str, concept: str, report: Any) -> Progress:
        step, total = report["step"], report["total"]
        losses = tuple((step, name, value) for name, value in report["losses"].items())
        moved = replace(now, step=step, total=total, losses=now.losses + losses)
        if report["increments"] is None:
            return moved
        return self._with_picture(moved, base, concept, report["increments"], f"step {step}")

    def _with_picture(self, now: Progress, base: str, concept: str, increments: Any, caption: str) -> Progress:
        """Draw the concept with an eraser as it is now, fully on, or without one."""
        erasers: dict[str, float] = {}
        if increments is not None:
            unfinished = _unfinished(concept, increments)
            self._studio.lend(base, unfinished)
            erasers = {unfinished.name: 1.0}
        try:
            *_, last = self._studio.draw(base, concept, [erasers], seed=_SEED, steps=_DRAWING_STEPS)
        finally:
            for name in erasers:
                self._studio.take_back(base, name)
        return replace(now, pictures=(*now.pictures, (last.drawn[0].picture, caption)))

    def _finished(self, now: Progress, base: str, concept: str, entry: EraserEntry) -> Progress:
        *_, last = self._studio.draw(base, concept, [{entry.name: 1.0}], seed=_SEED, steps=_DRAWING_STEPS)
        pictures = (*now.pictures, (last.drawn[0].picture, "with"))
        said = verdict(entry.read_manifest())
        return replace(now, step=now.total, pictures=pictures, name=entry.name, verdict=said)


def _takes_steps(method: str) -> bool:
    """Return whether a method trains in steps; the others are closed forms."""
    found = find_method(method)
    return found is not None and found.objective is not None


def _report(session: Session, lesson: _Lesson) -> None:
    """Train, and report the eraser or the error in the end."""
    try:
        (made,) = session.train()
        assert isinstance(made, EraserEntry)
        lesson.reports.put(made)
    except BaseException as error:
        with suppress(Exception):
            lesson.reports.put(error)


def _unfinished(concept: str, increments: Any) -> Adapter:
    """Return an eraser with the increments of a training in progress; it always acts."""
    manifest = Manifest(
        name=f"{_PREFIX}{slug(concept)}"[:64],
        concept=Concept(target=concept),
        increment=increment_info(increments),
        base=Base(family="unknown", id="", fingerprint=""),
        recipe={},
        gate=GateDefaults(kind="always"),
    )
    return Adapter(manifest, increments)
