"""Show how far long work has come: a bar in a terminal or a notebook, or calls of a function.

Work that is deep inside other work reports its own progress by `phase`, to the reporter of `show_phases`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


class Progress(Protocol):
    """Receives `step` of `total` steps done, and the figures to show with them.

    text: shown to a person in place of the figures.
    """

    def __call__(self, step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None: ...


ProgressCallback = Callable[[int, int], None]
"""Called with the number of steps (or bytes) done, and their total."""


def no_progress(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
    """Show nothing."""


class Reporter(Protocol):
    """Receives the remarks and the progress of long work."""

    def say(self, text: str) -> None:
        """Pass on a remark for a person."""

    def progress(self, label: str) -> AbstractContextManager[Progress]:
        """Open a display called `label`; it is closed at the end of the `with` block."""


@dataclass(frozen=True)
class Bars:
    """The reporter of a Python program: remarks go to the logger "spm_hub", at level INFO.

    shown: True for a bar where stderr is a terminal or the program is a notebook, False for none; or a function, which
    is called with (steps done, steps in all, figures).
    """

    shown: bool | Callable[[int, int, Mapping[str, float]], object] = True

    def say(self, text: str) -> None:
        logging.getLogger("spm_hub").info(text)

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        if not isinstance(self.shown, bool):
            yield self._called
            return
        try:
            from tqdm.auto import tqdm  # type: ignore[import-untyped]
        except ModuleNotFoundError:  # a program that uses gates alone
            yield no_progress
            return
        # A bar inside another one (leave=None) is wiped out when it is done.
        with tqdm(desc=label, disable=not (self.shown and _is_watched()), leave=None) as bar:

            def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
                bar.total = total
                if text:
                    bar.set_postfix_str(text, refresh=False)
                else:
                    bar.set_postfix(info, refresh=False)
                bar.update(step - bar.n)

            yield move

    def _called(self, step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
        assert not isinstance(self.shown, bool)
        self.shown(step, total, dict(info or {}))


@contextmanager
def progress_if_long(reporter: Reporter, label: str, *, after: float = 1.0) -> Iterator[Progress]:
    """Open the reporter's display only for work that is still going on after so many seconds."""
    began = time.monotonic()
    with ExitStack() as stack:
        shown: Progress | None = None

        def move(step: int, total: int, info: Mapping[str, float] | None = None, text: str = "") -> None:
            nonlocal shown
            if shown is None and step < total and time.monotonic() - began >= after:
                shown = stack.enter_context(reporter.progress(label))
            if shown is not None:
                shown(step, total, info, text)

        yield move


_phases_to: ContextVar[Reporter | None] = ContextVar("_phases_to", default=None)


@contextmanager
def show_phases(reporter: Reporter) -> Iterator[None]:
    """Show the phases of the work inside to `reporter`.

    A function of the caller's counts the steps of the whole work, so that it is not called for phases.
    """
    counts = isinstance(reporter, Bars) and not isinstance(reporter.shown, bool)
    token = _phases_to.set(None if counts else reporter)
    try:
        yield
    finally:
        _phases_to.reset(token)


@contextmanager
def phase(label: str) -> Iterator[Progress]:
    """Show the progress of a part of some longer work, once it has taken a second.

    Ctrl-C inside gets the label as a note, for the message that says where the work was stopped.
    """
    reporter = _phases_to.get()
    try:
        if reporter is None:
            yield no_progress
        else:
            with progress_if_long(reporter, label) as move:
                yield move
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(label)
        raise


def _is_watched() -> bool:
    """Return whether a person sees a bar: in a terminal, or in a notebook, whose stderr is not one."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
