"""The front door: OpenAI's endpoints over HTTP. The one home of FastAPI.

A request is checked from the outside in: who asks, how large, is it JSON, does it make sense, is there room. Then its
answer has a thread, and its text comes here. What goes wrong inside is told in general words only.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from gaisnet.config import FrontSettings
from gaisnet.errors import ContextFull, GaisnetError, ServiceFull, SessionRefused, UnknownModel
from gaisnet.serving import dialect
from gaisnet.serving.answering import Answering, Ask
from gaisnet.serving.dialect import BadRequest, ChatRequest, CompletionRequest, Envelope, read_request
from gaisnet.serving.keys import ApiKeys, is_loopback
from gaisnet.serving.metrics import CONTENT_TYPE, Metrics
from gaisnet.serving.running import Running

T = TypeVar("T")
_log = logging.getLogger(__name__)
_INVALID = "invalid_request_error"
_GONE = 499  # in metrics: the client left
_RETRY_S = "1"


class Refusal(Exception):
    """A response that says no, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def response(self) -> Response:
        """The same for a client."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """What a client is told of ``error``: all about its own request, nothing about the inside."""
    match error:
        case Refusal():
            return error
        case _ClientGone() | ClientDisconnect():
            return Refusal(_GONE, _INVALID, "the client has left")
        case BadRequest():
            return Refusal(400, _INVALID, str(error), error.code, error.param)
        case UnknownModel():
            return Refusal(404, _INVALID, str(error), "model_not_found", "model")
        case ContextFull():
            return Refusal(400, _INVALID, str(error), "context_length_exceeded")
        case SessionRefused():
            return Refusal(400, _INVALID, str(error))
        case ServiceFull():
            return _later(503, "there is no room for another answer now", "overloaded")
        case GaisnetError():
            return _later(503, "the body that should write this answer cannot be had now", "unavailable")
    return Refusal(500, "server_error", "something went wrong in here; it is in the server's log", "internal_error")


def _later(status: int, found: str, code: str) -> Refusal:
    return Refusal(status, "server_error", f"{found}; try again", code, headers={"Retry-After": _RETRY_S})


class _ClientGone(Exception):
    """Nobody waits for this answer any more."""


class _Events(StreamingResponse):
    """Server-sent events; whatever becomes of the client, ``done`` is called."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class _Door:
    """Everything behind the routes."""

    def __init__(self, answering: Answering, settings: FrontSettings, keys: ApiKeys, metrics: Metrics) -> None:
        self._answering = answering
        self._settings = settings
        self._keys = keys
        self._metrics = metrics
        self._running: set[Running] = set()
        self._created = int(time.time())
        self._pool = ThreadPoolExecutor(settings.max_answers, thread_name_prefix="answer")

    def admit(self, request: Request) -> None:
        """Raise ``Refusal`` unless the caller may ask."""
        if not self._keys and not is_loopback(_host(request)):  # a web page has pointed its own name at this machine
            raise Refusal(403, _INVALID, "without API keys only this machine's own names are answered", "wrong_host")
        if not self._keys.admit(request.headers.get("authorization")):
            told = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, _INVALID, "a known API key is needed", "invalid_api_key", headers=told)

    def models(self, request: Request, name: str | None = None) -> Response:
        """What there is, or one of it."""
        self.admit(request)
        if name is not None:
            self._answering.check_model(name)
        names = self._answering.models if name is None else (name,)
        found = [{"id": name, "object": "model", "created": self._created, "owned_by": "gaisnet"} for name in names]
        return JSONResponse({"object": "list", "data": found} if name is None else found[0])

    def told(self, request: Request) -> Response:
        """What Prometheus reads."""
        self.admit(request)
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def answer(self, request: Request, kind: type[dialect.Request]) -> Response:
        """Answer a chat or a completion."""
        model = "none"
        try:
            self.admit(request)
            asked = read_request(kind, await self._body(request))
            self._answering.check_model(asked.model)
            model = asked.model
            limits = self._answering.tokenizer, self._settings, self._answering.context
            ask = await asyncio.to_thread(asked.to_ask, *limits)
            running = self._run(ask)
        except Exception as error:
            response = _told(error)
            self._metrics.refused(model, response.status_code)
            return response
        envelope = Envelope.new("chat" if kind is ChatRequest else "text", model)
        if asked.stream:
            return await _stream(request, running, envelope, asked)
        return await _whole(request, running, envelope)

    async def _body(self, request: Request) -> bytes:
        """The request's body. Raises ``Refusal`` where it is too large, and then keeps no more of it."""
        limit, body = self._settings.max_body_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise Refusal(413, _INVALID, f"the body is larger than {limit} bytes", "body_too_large")
        return bytes(body)

    def _run(self, ask: Ask) -> Running:
        """Begin an answer. Raises ``Refusal`` where there are too many."""
        limit = self._settings.max_answers
        if len(self._running) >= limit:
            found = f"{limit} answers are under way and no more are allowed; try again when one has ended"
            raise Refusal(429, "rate_limit_error", found, "rate_limit_exceeded", headers={"Retry-After": _RETRY_S})
        clock = self._metrics.clock(ask.model)
        running = Running(
            self._pool, lambda: self._answering.begin(ask, clock), lambda run: self._ended(run, ask.model)
        )
        self._running.add(running)
        self._metrics.began()
        return running

    def _ended(self, running: Running, model: str) -> None:
        self._running.discard(running)
        status = 200 if running.error is None else refusal_of(running.error).status
        self._metrics.ended(model, _GONE if running.stopped else status, running.course if running.begun else None)

    @asynccontextmanager
    async def open(self, app: FastAPI) -> AsyncIterator[None]:
        """As long as the server is up; then answers that are under way are broken off."""
        yield
        for running in tuple(self._running):
            running.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)


async def _whole(request: Request, running: Running, envelope: Envelope) -> Response:
    try:
        text = await _unless_gone(request, running.whole())
    except Exception as error:
        return _told(error)
    finally:
        running.stop()
    return JSONResponse(envelope.whole(text, running.course))


async def _stream(request: Request, running: Running, envelope: Envelope, asked: dialect.Request) -> Response:
    """A stream, whose status is known only when the first token is there."""
    try:
        await _unless_gone(request, running.first())
    except BaseException as error:
        running.stop()
        if isinstance(error, Exception):
            return _told(error)
        raise
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return _Events(_events(running, envelope, include_usage), running.stop)


async def _events(running: Running, envelope: Envelope, include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events. What goes wrong in mid-stream is an event too, and the last one."""
    for chunk in envelope.first():
        yield _event(chunk)
    try:
        async for piece in running.text():
            yield _event(envelope.piece(piece, running.course))
    except Exception as error:
        yield _event(_noted(error).body)
        return
    for chunk in envelope.last(running.course, include_usage):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What comes of ``work``. Raises ``_ClientGone`` if the client leaves before."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _host(request: Request) -> str:
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _noted(error: Exception) -> Refusal:
    """What a client is told; what is our own fault is logged."""
    refusal = refusal_of(error)
    if refusal.status == 500:
        _log.error("an answer failed", exc_info=error)
    elif refusal.status == 503:
        _log.warning("an answer failed: %s", error)
    return refusal


def _told(error: Exception) -> Response:
    return _noted(error).response()


def make_app(
    answering: Answering,
    settings: FrontSettings,
    keys: ApiKeys,
    gauges: Mapping[str, Callable[[], float]] | None = None,
) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        answering: What writes.
        settings: Limits.
        keys: Who may ask.
        gauges: More figures for ``/metrics``, by name.
    """
    door = _Door(answering, settings, keys, Metrics(gauges or {}))
    app = FastAPI(title="GaisNet", docs_url=None, redoc_url=None, openapi_url=None, lifespan=door.open)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await door.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await door.answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return door.models(request)

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> Response:
        return door.models(request, name)

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return door.told(request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, _INVALID, str(error.detail), "not_found", headers=error.headers).response()

    @app.exception_handler(Refusal)
    @app.exception_handler(GaisnetError)
    async def refused(request: Request, error: Exception) -> Response:
        return _told(error)

    return app
