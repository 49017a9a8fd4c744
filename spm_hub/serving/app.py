"""The routes of a server: OpenAI's interface for pictures, and one for erasers and gates."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from spm_hub.errors import (
    BusyError,
    ClosingError,
    CompatibilityError,
    ForbiddenError,
    NotFoundError,
    SpmHubError,
    UsageError,
)
from spm_hub.serving.requests import EraserRequest, GatesRequest, ImagesRequest, parse
from spm_hub.serving.service import ClientGoneError, Service

_STATUS: tuple[tuple[type[SpmHubError], int], ...] = (
    (NotFoundError, 404),
    (ForbiddenError, 403),
    (UsageError, 400),
    (CompatibilityError, 409),
    (BusyError, 429),
    (ClosingError, 503),
)
_CLIENT_GONE = 499
"""The status, which only the counts see, of a request whose client closed the connection."""
_OPEN = ("/health",)
"""Paths that need no key: a load balancer has none."""
_RETRY_AFTER = {"Retry-After": "2"}
_LOG = logging.getLogger("spm_hub")


class UnauthorisedError(SpmHubError):
    """A request without the server's key."""


def make_app(service: Service, key: str | None = None) -> FastAPI:
    """Return the application of a service.

    key: what clients send as "Authorization: Bearer KEY"; None lets everybody in.
    """
    app = FastAPI(title="spm-hub", docs_url=None, redoc_url=None, openapi_url="/openapi.json")

    async def images(request: Request) -> Response:
        body = parse(ImagesRequest, await _body(request, service))
        return JSONResponse(await service.draw(body, request.is_disconnected))

    async def gates(request: Request) -> Response:
        return JSONResponse(await service.gates(parse(GatesRequest, await _body(request, service))))

    async def add(request: Request) -> Response:
        return JSONResponse(await service.add(parse(EraserRequest, await _body(request, service))), 201)

    async def recover(request: Request) -> Response:
        return JSONResponse(await service.recover(request.path_params["name"]))

    async def erasers(request: Request) -> Response:
        return JSONResponse(service.erasers())

    async def models(request: Request) -> Response:
        return JSONResponse(service.models())

    async def health(request: Request) -> Response:
        return JSONResponse(service.health(), 503 if service.draining else 200)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.counts(), media_type="text/plain; version=0.0.4")

    for method, path, handler, kind, about in (
        ("POST", "/v1/images/generations", images, ImagesRequest, "Draw pictures."),
        ("POST", "/v1/gates", gates, GatesRequest, "Say how strongly each eraser acts on prompts, and why."),
        ("POST", "/v1/erasers", add, EraserRequest, "Attach an eraser of the registry."),
        ("DELETE", "/v1/erasers/{name}", recover, None, "Take an eraser off."),
        ("GET", "/v1/erasers", erasers, None, "List the attached erasers."),
        ("GET", "/v1/models", models, None, "List the base model."),
        ("GET", "/health", health, None, "Say whether the server takes requests."),
        ("GET", "/metrics", metrics, None, "Count what was done, for Prometheus."),
    ):
        schema = {} if kind is None else {"application/json": {"schema": kind.model_json_schema()}}
        extra = {"requestBody": {"required": True, "content": schema}} if schema else None
        app.add_api_route(path, _in_words(handler), methods=[method], summary=about, openapi_extra=extra)
    app.add_exception_handler(HTTPException, _unknown_route)
    app.add_middleware(Gatekeeper, service=service, key=key)
    return app


class Gatekeeper:
    """Checks the key of each request, refuses it while the server drains, and counts the answer."""

    def __init__(self, app: ASGIApp, service: Service, key: str | None) -> None:
        self._app, self._service = app, service
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = _CLIENT_GONE, time.monotonic()

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        self._service.active += 1
        try:
            await (self._app if refusal is None else _answer(refusal))(scope, receive, counted)
        finally:
            self._service.active -= 1
            self._service.metrics.request(_label(scope["path"]), status, time.monotonic() - begun)

    def _refusal(self, scope: Scope) -> SpmHubError | None:
        if scope["path"] in _OPEN:
            return None
        if self._key is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            kind, _, token = given.partition(b" ")
            # The comparison takes as long for a key that is nearly right.
            if not hmac.compare_digest(token.strip(), self._key) or kind.lower() != b"bearer":
                return UnauthorisedError("this server needs its key", mend='the header "Authorization: Bearer KEY"')
        if self._service.draining and scope["method"] != "GET":
            return ClosingError("this server is shutting down and takes no more requests", mend="ask another one")
        return None


def _in_words(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Return a handler whose errors are answers in words."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except SpmHubError as error:
            return _answer(error)
        except ClientGoneError:
            return Response(status_code=_CLIENT_GONE)
        except Exception as error:  # of the pipeline, or of a device without memory
            _LOG.exception("a request failed")
            first = str(error).strip().partition("\n")[0]
            return _answer(SpmHubError(f"the request failed: {first or type(error).__name__}"))

    return handle


def _answer(error: SpmHubError) -> Response:
    """Return the answer that an error makes, in the form of OpenAI's."""
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
    status = 401 if isinstance(error, UnauthorisedError) else status
    described = {
        "message": error.message, "type": type(error).__name__, "try": error.mend, "code": status, "param": None
    }  # fmt: skip
    return JSONResponse({"error": described}, status, _RETRY_AFTER if status in (429, 503) else None)


def _unknown_route(request: Request, error: Exception) -> Response:
    """Answer a request for a path or a method that there is not."""
    status = getattr(error, "status_code", 404)
    described = {
        "message": f"there is no {request.method} {request.url.path} here",
        "type": "NotFoundError",
        "try": "GET /openapi.json lists all",
        "code": status,
        "param": None,
    }
    return JSONResponse({"error": described}, status)


async def _body(request: Request, service: Service) -> bytes:
    """Return the body of a request.

    Raises UsageError for another type than JSON, and for one that is too long.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Browsers send other types to any server without asking, from any page.
        raise UsageError(f"the body's content type is {kind!r}", mend="-H 'Content-Type: application/json'")
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        service.menu.limits.check("the length of the body", length, service.menu.limits.body)
        parts.append(part)
    return b"".join(parts)


def _label(path: str) -> str:
    """Return the name of a route for the counts: a client must not be able to make new ones."""
    known = {"/v1/images/generations": "images", "/v1/gates": "gates", "/v1/erasers": "erasers", "/v1/models": "models"}
    if path.startswith("/v1/erasers/"):
        return "erasers"
    return known.get(path, path[1:] if path in ("/health", "/metrics") else "other")
