"""Runs a service on a socket until it is asked to end.

The requests that it has are finished then, and new ones get a 503.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from spm_hub.errors import UsageError
from spm_hub.serving.app import make_app
from spm_hub.serving.service import Service

BACKLOG = 1024
"""Connections that may wait to be accepted."""
FORCED = 130
"""The exit code after a second signal."""
_KEPT_ALIVE = 30
"""Seconds that an idle connection stays open."""


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Open a socket at an address; port 0 chooses a free one.

    It refuses connections until its `listen` is called. Raises UsageError where that is not possible.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}",
            mend=f"--port {port % 65535 + 1}, or --host 127.0.0.1",
        ) from error
    with listener:
        yield listener


class _Server(uvicorn.Server):  # type: ignore[misc]
    """A uvicorn server that answers requests with a 503 while it finishes those that it has."""

    def __init__(self, config: Any, service: Service, say: Callable[[str], object]) -> None:
        super().__init__(config)
        self._service, self._say = service, say
        self.forced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            self.forced = self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        self._say(f"finishing {self._service.active} requests; a second signal ends at once")

    async def on_tick(self, counter: int) -> bool:
        if self._service.draining and not self._service.active:
            self.should_exit = True
        return bool(await super().on_tick(counter))


def run(
    service: Service, listener: socket.socket, *, key: str | None = None, say: Callable[[str], object] = lambda _: None
) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one ends at once.

    key: as for `make_app`.  say: called with remarks for a person.
    """
    config = uvicorn.Config(
        make_app(service, key),
        log_level="warning",
        access_log=False,
        timeout_keep_alive=_KEPT_ALIVE,
        server_header=False,
        lifespan="off",
        backlog=BACKLOG,
    )
    server = _Server(config, service, say)
    server.run(sockets=[listener])
    if server.forced:
        sys.exit(FORCED)
    service.engine.close()
