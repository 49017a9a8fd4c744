"""Draws queued orders in batches: one thread has the pipeline to itself.

Erasers are changed between the batches.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

from spm_hub.attachment.attachment import Attachment
from spm_hub.errors import BusyError, ClosingError, SpmHubError
from spm_hub.io.wording import counted
from spm_hub.serving.drawing import Drawn, Order, draw

T = TypeVar("T")


class Observer(Protocol):
    """Is informed of each batch that was drawn."""

    def batch(self, pictures: int, seconds: float) -> None:
        """Take the number of pictures of a batch and the seconds that it took."""


class Unobserved:
    """The observer that does nothing."""

    def batch(self, pictures: int, seconds: float) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _Waiting:
    """An order in the queue, when it came (`time.monotonic`), and where its picture goes."""

    order: Order
    since: float
    answer: Future[Drawn]


class Engine:
    """A pipeline with erasers that draws for several threads.

    Orders are drawn in the order in which they came; those with the same `Order.settings` that wait with the first one
    join its batch. Changes to the erasers go before waiting orders, and never into a batch.
    """

    def __init__(
        self,
        pipe: Any,
        erasers: Attachment,
        *,
        together: int = 8,
        patience: float = 0.0,
        most_waiting: int = 256,
        observer: Observer | None = None,
    ) -> None:
        """Start the thread that draws.

        together: the most pictures of a batch.  patience: seconds that a picture may wait for others to join it.
        most_waiting: pictures in the queue, beyond which `submit` refuses more.
        """
        self._pipe, self._erasers = pipe, erasers
        self._together, self._patience, self._most_waiting = together, patience, most_waiting
        self._observer = observer or Unobserved()
        self._orders: deque[_Waiting] = deque()
        self._changes: deque[tuple[Callable[[Attachment], Any], Future[Any]]] = deque()
        self._awake = threading.Condition()
        self._closing = False
        self._drawing = 0
        self._thread = threading.Thread(target=self._work, name="spm-hub engine", daemon=True)
        self._thread.start()

    @property
    def erasers(self) -> tuple[str, ...]:
        """The names of the erasers that are attached."""
        return self._erasers.names

    @property
    def waiting(self) -> int:
        """The number of pictures that wait."""
        return len(self._orders)

    @property
    def drawing(self) -> int:
        """The number of pictures that are being drawn."""
        return self._drawing

    def submit(self, orders: Sequence[Order]) -> list[Future[Drawn]]:
        """Queue the pictures of one request; its futures end with the pictures, or an error each.

        A future that is cancelled before its picture is begun takes it out of the queue. Raises NotFoundError for an
        eraser that is not attached, BusyError if there is no room for all of them, ClosingError after `close`.
        """
        for order in orders:
            order.choose(self.erasers)
        now = time.monotonic()
        with self._awake:
            if self._closing:
                raise ClosingError("this server is shutting down and takes no more requests", mend="ask another one")
            if len(self._orders) + len(orders) > self._most_waiting:
                raise BusyError(
                    f"{counted(len(self._orders), 'picture')} wait already, and {len(orders)} more would exceed the "
                    f"queue's {self._most_waiting}",
                    mend="ask again in a few seconds",
                )
            waiting = [_Waiting(order, now, Future()) for order in orders]
            self._orders.extend(waiting)
            self._awake.notify_all()
        return [one.answer for one in waiting]

    def run(self, change: Callable[[Attachment], T]) -> Future[T]:
        """Call a function with the attachment between two batches, before orders that wait.

        Raises ClosingError after `close`.
        """
        answer: Future[T] = Future()
        with self._awake:
            if self._closing:
                raise ClosingError("this server is shutting down and takes no more changes", mend="ask another one")
            self._changes.append((change, answer))
            self._awake.notify_all()
        return answer

    def close(self) -> None:
        """Refuse new orders, draw those that wait, and end. A second call waits for the same."""
        with self._awake:
            self._closing = True
            self._awake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        while (task := self._next()) is not None:
            if isinstance(task, list):
                self._drawing = len(task)
                try:
                    self._draw(task)
                finally:
                    self._drawing = 0
            else:
                _settle(task[1], partial(task[0], self._erasers))

    def _next(self) -> list[_Waiting] | tuple[Callable[[Attachment], Any], Future[Any]] | None:
        """Wait for a change or a batch, None once there will be no more."""
        with self._awake:
            while True:
                if self._changes:
                    return self._changes.popleft()
                while self._orders and self._orders[0].answer.cancelled():
                    self._orders.popleft()
                if not self._orders:
                    if self._closing:
                        return None
                    self._awake.wait()
                    continue
                batch = self._first_batch()
                left = self._orders[0].since + self._patience - time.monotonic()
                full = len(batch) == self._together or batch[0].order.exact
                if full or left <= 0 or self._closing:
                    taken = set(map(id, batch))
                    self._orders = deque(one for one in self._orders if id(one) not in taken)
                    if begun := [one for one in batch if one.answer.set_running_or_notify_cancel()]:
                        return begun
                    continue
                self._awake.wait(left)

    def _first_batch(self) -> list[_Waiting]:
        """Return the first order that waits, with those that can join it."""
        first = self._orders[0]
        if first.order.exact:
            return [first]
        alike = (
            one
            for one in self._orders
            if one.order.settings == first.order.settings and not one.order.exact and not one.answer.cancelled()
        )
        return [one for one, _ in zip(alike, range(self._together), strict=False)]

    def _draw(self, batch: Sequence[_Waiting]) -> None:
        """Draw a batch and answer its orders.

        If its call fails, each picture is drawn alone, so that only the guilty one fails.
        """
        begun = time.monotonic()
        try:
            drawn = draw(self._pipe, self._erasers, [one.order for one in batch])
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._draw([one])
                return
            batch[0].answer.set_exception(error)
            return
        self._observer.batch(len(batch), time.monotonic() - begun)
        for one, made in zip(batch, drawn, strict=True):
            if isinstance(made, SpmHubError):
                one.answer.set_exception(made)
            else:
                one.answer.set_result(made)


def _settle(answer: Future[T], work: Callable[[], T]) -> None:
    """Give a future the result of some work, or its error, unless it was cancelled."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except Exception as error:
        with suppress(Exception):
            answer.set_exception(error)
        return
    answer.set_result(result)
