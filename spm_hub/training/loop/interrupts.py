"""Delays Ctrl-C while a step of training is recorded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def delay_interrupts() -> Iterator[None]:
    """Ctrl-C inside is raised at the end, so that a checkpoint never holds half of a step.

    Only the main thread receives signals and may set their handlers; in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield
    finally:
        # None is a handler that Python did not set, and cannot put back.
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if pending:
        signal.raise_signal(signal.SIGINT)
