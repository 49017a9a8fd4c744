"""The work behind each route: orders to the engine, erasers from the registry, answers as plain data."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from spm_hub.adapters.adapter import Adapter
from spm_hub.adapters.lookup import find_name
from spm_hub.adapters.manifest import Manifest
from spm_hub.attachment.attachment import Attachment
from spm_hub.errors import ForbiddenError, NotFoundError, UsageError, unknown_eraser
from spm_hub.evaluation.pictures import png_of
from spm_hub.registry.registry import registries
from spm_hub.serving.drawing import Drawn, Order
from spm_hub.serving.engine import Engine
from spm_hub.serving.metrics import Metrics
from spm_hub.serving.requests import EraserRequest, GatesRequest, ImagesRequest, Menu

_PATIENCE = 0.5
"""Seconds between two looks whether the client is still there."""


class ClientGoneError(Exception):
    """The client closed its connection before its pictures were drawn."""


Gone = Callable[[], Awaitable[bool]]
"""Returns whether the client has closed its connection."""


class Service:
    """One served base model, its erasers and its counts.

    draining: set once the server takes no more requests.  active: the requests that are being answered.
    """

    def __init__(
        self,
        pipe: Any,
        erasers: Attachment,
        adapters: Sequence[Adapter],
        menu: Menu,
        *,
        registry: Path | None = None,
        together: int = 8,
        patience: float = 0.01,
        most_waiting: int = 256,
    ) -> None:
        """Start an engine; `adapters` are those that `erasers` has attached.

        registry: where `add` looks names up first. together, patience, most_waiting: as for `Engine`.
        """
        self.menu, self.metrics = menu, Metrics()
        self.draining, self.active = False, 0
        self.engine = Engine(
            pipe, erasers, together=together, patience=patience, most_waiting=most_waiting, observer=self.metrics
        )
        self._erasers, self._registry = erasers, registry
        self._manifests = {adapter.name: adapter.manifest for adapter in adapters}
        self._begun = int(time.time())

    async def draw(self, request: ImagesRequest, gone: Gone) -> dict[str, Any]:
        """Draw the pictures of a request, unless its client leaves before they are begun.

        Raises UsageError, NotFoundError, ForbiddenError, BusyError, ClosingError, ClientGoneError.
        """
        orders = self.menu.orders(request)
        pending = self.engine.submit(orders)
        try:
            drawn = await _all_of(pending, gone)
        except BaseException:
            for one in pending:
                one.cancel()
            raise
        data = await asyncio.to_thread(lambda: [self._picture(*pair) for pair in zip(orders, drawn, strict=True)])
        return {"created": int(time.time()), "model": self.menu.model, "data": data}

    async def gates(self, request: GatesRequest) -> dict[str, Any]:
        """Return each eraser's gamma for prompts, and what gave it. Raises UsageError, NotFoundError."""
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        for prompt in prompts:
            self.menu.limits.check_prompt("prompt", prompt)
        wanted = None if request.erasers is None else [find_name(name, self.engine.erasers) for name in request.erasers]

        def explain(erasers: Attachment) -> list[dict[str, Any]]:
            return [
                {
                    "prompt": prompt,
                    "erasers": [
                        {"id": name, "gamma": one.gamma, "term": one.term, "shown": one.shown, "token": one.token}
                        for name, one in erasers.explain(prompt).items()
                        if wanted is None or name in wanted
                    ],
                }
                for prompt in prompts
            ]

        return {"object": "list", "data": await asyncio.wrap_future(self.engine.run(explain))}

    async def add(self, request: EraserRequest) -> dict[str, Any]:
        """Attach an eraser of the registry.

        Raises NotFoundError for an unknown name, UsageError for one that is attached already or undoes another,
        CompatibilityError for one that does not fit the base.
        """
        adapter = await asyncio.to_thread(self._load, request.name)

        def attach(erasers: Attachment) -> None:
            if adapter.name in erasers:
                raise UsageError(f"the eraser {adapter.name} is attached already", mend="DELETE it first")
            erasers.add(adapter, force=request.force)
            self._manifests[adapter.name] = adapter.manifest

        await asyncio.wrap_future(self.engine.run(attach))
        return self._eraser(adapter.name, adapter.manifest)

    async def recover(self, name: str) -> dict[str, Any]:
        """Take an eraser off. Raises NotFoundError, ForbiddenError for a required one."""
        found = find_name(name, self.engine.erasers)
        if found in self.menu.required:
            raise ForbiddenError(f"the eraser {found} is required on this server", mend="restart it without --required")

        def remove(erasers: Attachment) -> None:
            erasers.recover(found)
            del self._manifests[found]

        await asyncio.wrap_future(self.engine.run(remove))
        return {"id": found, "object": "eraser", "deleted": True}

    def erasers(self) -> dict[str, Any]:
        """Return the attached erasers."""
        return {"object": "list", "data": [self._eraser(*pair) for pair in tuple(self._manifests.items())]}

    def models(self) -> dict[str, Any]:
        """Return the served base as a list of one."""
        one = {"id": self.menu.model, "object": "model", "created": self._begun, "owned_by": "spm-hub"}
        return {"object": "list", "data": [one]}

    def health(self) -> dict[str, Any]:
        """Return whether the server takes requests, and how busy it is."""
        return {
            "status": "draining" if self.draining else "ok",
            "model": self.menu.model,
            "erasers": len(self.engine.erasers),
            "waiting": self.engine.waiting,
            "drawing": self.engine.drawing,
        }

    def counts(self) -> str:
        """Return all counts in Prometheus' text format."""
        return self.metrics.render(
            {
                "spmhub_pictures_waiting": ("Pictures in the queue.", self.engine.waiting),
                "spmhub_pictures_drawing": ("Pictures of the batch in progress.", self.engine.drawing),
                "spmhub_erasers": ("Erasers that are attached.", len(self.engine.erasers)),
                "spmhub_draining": ("1 once the server takes no more requests.", float(self.draining)),
            }
        )

    def _load(self, name: str) -> Adapter:
        """Load an eraser by its name, or that of its concept: never by a path, which clients must not choose."""
        known = registries(self._registry)
        for place in known:
            try:
                return place.get(name).load()
            except NotFoundError:
                continue
        error = unknown_eraser(name, [entry.name for place in known for entry in place.entries()], "on this server")
        raise NotFoundError(error.message, mend="an eraser of the server's registry")

    def _eraser(self, name: str, manifest: Manifest) -> dict[str, Any]:
        return {
            "id": name,
            "object": "eraser",
            "concept": manifest.concept.target,
            "kind": manifest.concept.kind,
            "gate": manifest.default_gate,
            "strength": self._erasers.strength.get(name),
            "required": name in self.menu.required,
        }

    def _picture(self, order: Order, drawn: Drawn) -> dict[str, Any]:
        about: Mapping[str, Any] = {
            "model": self.menu.model, "prompt": order.prompt, "seed": order.seed, "gates": dict(drawn.gammas),
            "strength": dict(drawn.strengths),
        }  # fmt: skip
        return {
            "b64_json": base64.b64encode(png_of(drawn.picture, about)).decode("ascii"),
            "seed": order.seed,
            "erasers": [
                {"id": name, "gamma": drawn.gammas.get(name), "strength": strength}
                for name, strength in drawn.strengths.items()
            ],
            "drawn_together": drawn.together,
        }


async def _all_of(pending: Sequence[Future[Drawn]], gone: Gone) -> list[Drawn]:
    """Wait for all pictures. Raises the first error, or ClientGoneError."""
    waiting = [asyncio.wrap_future(one) for one in pending]
    left: set[Any] = set(waiting)
    while left:
        done, left = await asyncio.wait(left, timeout=_PATIENCE, return_when=asyncio.FIRST_EXCEPTION)
        for one in done:
            one.result()
        if left and await gone():
            raise ClientGoneError
    return [one.result() for one in waiting]
