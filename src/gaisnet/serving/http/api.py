"""The HTTP endpoint: OpenAI's API. The one home of FastAPI.

A request is checked from the outside in: caller, size, JSON, fields, room. Then its
answers have a thread each, and their text arrives here.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gaisnet.config import FrontSettings
from gaisnet.errors import GaisnetError
from gaisnet.serving.generation.answering import Answering, GenerationRequest
from gaisnet.serving.http import dialect
from gaisnet.serving.http.callers import ApiKeys, Callers
from gaisnet.serving.http.dialect import ChatRequest, CompletionRequest, read_request
from gaisnet.serving.http.metrics import CONTENT_TYPE, Metrics
from gaisnet.serving.http.refusals import GONE, INVALID, ClientGone, Refusal, log_refusal, refusal_of, too_many
from gaisnet.serving.http.responses import Choices, Envelope, StreamedAnswer

T = TypeVar("T")
_READERS = 2  # threads that read bodies and do nothing else
_READING = ["GET", "HEAD"]


class _Events(StreamingResponse):
    """Server-sent events; ``done`` is called whatever becomes of the client."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events (see ``StreamingResponse``)."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


class _Routes:
    """State and work behind the routes."""

    def __init__(self, answering: Answering, settings: FrontSettings, keys: ApiKeys, metrics: Metrics) -> None:
        self._answering = answering
        self._settings = settings
        self._callers = Callers(keys, settings.cors_origins)
        self._metrics = metrics
        self._running: set[StreamedAnswer] = set()
        self._freed = asyncio.Event()
        self._created = int(time.time())
        self._pool = ThreadPoolExecutor(settings.max_answers, thread_name_prefix="answer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="request")

    def models(self, request: Request, name: str | None = None) -> Response:
        """Return all models, or one of them."""
        self._callers.admit(request.headers)
        if name is not None:
            self._answering.check_model(name)
        names = self._answering.models if name is None else (name,)
        found = [self._model(name) for name in names]
        return JSONResponse({"object": "list", "data": found} if name is None else found[0])

    def _model(self, name: str) -> dict[str, Any]:
        context = self._answering.context  # the field's name is vLLM's, which clients know
        made = {"created": self._created, "owned_by": "gaisnet", "max_model_len": context}
        return {"id": name, "object": "model", **made}

    def metrics(self, request: Request) -> Response:
        """Return the text for Prometheus."""
        self._callers.admit(request.headers)
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def answer(self, request: Request, kind: type[dialect.Request]) -> Response:
        """Answer a chat or completions."""
        model = "none"
        try:
            self._callers.admit(request.headers)
            asked = await self._read(kind, await self._body(request))
            self._answering.check_model(asked.model)
            model = asked.model
            limits = self._answering.tokenizer, self._settings, self._answering.context
            choices = Choices(await asyncio.to_thread(asked.to_generation_requests, *limits), self._run, self._room)
        except Exception as error:
            response = _error_response(error)
            self._metrics.count_response(model, response.status_code)
            return response
        envelope = Envelope.for_request("chat" if kind is ChatRequest else "text", model)
        if asked.stream:
            return await _stream(request, choices, envelope, asked)
        return await _respond_at_once(request, choices, envelope)

    async def _body(self, request: Request) -> bytes:
        """Read the request's body. Raises ``Refusal`` if it is too large or too slow, and then keeps no more of it."""
        limit, body = self._settings.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout_s):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise Refusal(413, INVALID, f"the body is larger than {limit} bytes", "body_too_large")
        except TimeoutError:
            found = f"the body took more than {self._settings.body_timeout_s:g} s"
            raise Refusal(408, INVALID, found, "body_too_slow", headers={"Connection": "close"}) from None
        return bytes(body)

    async def _read(self, kind: type[dialect.R], body: bytes) -> dialect.R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, read_request, kind, body, self._settings)

    def _run(self, ask: GenerationRequest) -> StreamedAnswer:
        """Begin an answer. Raises ``Refusal`` if there are too many."""
        if len(self._running) >= self._settings.max_answers:
            raise too_many(self._settings.max_answers)
        clock = self._metrics.start_timer(ask.model)
        running = StreamedAnswer(
            self._pool, lambda: self._answering.begin(ask, clock), lambda run: self._ended(run, ask.model)
        )
        self._running.add(running)
        self._metrics.count_begun()
        return running

    async def _room(self) -> None:
        """Wait until another answer may begin."""
        while len(self._running) >= self._settings.max_answers:
            self._freed.clear()
            await self._freed.wait()

    def _ended(self, running: StreamedAnswer, model: str) -> None:
        self._running.discard(running)
        self._freed.set()
        status = 200 if running.error is None else refusal_of(running.error).status
        self._metrics.count_ended(model, GONE if running.stopped else status, running.course if running.begun else None)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Serve inside the context; at its end, stop answers in progress."""
        yield
        for running in tuple(self._running):
            running.stop()
        for pool in (self._pool, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)


async def _respond_at_once(request: Request, choices: Choices, envelope: Envelope) -> Response:
    try:
        texts = await _unless_gone(request, choices.collect_texts())
    except Exception as error:
        return _error_response(error)
    finally:
        choices.stop()
    return JSONResponse(envelope.full_response(texts, choices.courses))


async def _stream(request: Request, choices: Choices, envelope: Envelope, asked: dialect.Request) -> Response:
    """Stream an answer; the status is known when the first token is there."""
    try:
        await _unless_gone(request, choices.wait_for_first())
    except BaseException as error:
        choices.stop()
        if isinstance(error, Exception):
            return _error_response(error)
        raise
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    return _Events(_events(choices, envelope, include_usage), choices.stop)


async def _events(choices: Choices, envelope: Envelope, include_usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events. An error in mid-stream is the last event."""
    for chunk in envelope.first_chunks():
        yield _event(chunk)
    try:
        async for piece in choices.pieces():
            course = choices.course(piece.index)
            ended = piece.text is None
            yield _event(
                envelope.last_chunk(piece.index, course)
                if ended
                else envelope.text_chunk(piece.index, piece.text or "", course)
            )
    except Exception as error:
        yield _event(log_refusal(error).body)
        return
    if include_usage:
        yield _event(envelope.usage_chunk(choices.courses))
    yield "data: [DONE]\n\n"


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``. Raises ``ClientGone`` if the client leaves first."""
    working, watching = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error_response(error: Exception) -> Response:
    return log_refusal(error).to_response()


def make_app(
    answering: Answering,
    settings: FrontSettings,
    keys: ApiKeys,
    gauges: Mapping[str, Callable[[], float]] | None = None,
) -> FastAPI:
    """Make the application, for any ASGI server.

    Args:
        answering: Writes answers.
        settings: Limits, and allowed origins of web pages.
        keys: Keys of callers.
        gauges: More figures for ``/metrics``, by name.
    """
    routes = _Routes(answering, settings, keys, Metrics(gauges or {}))
    app = FastAPI(title="GaisNet", docs_url=None, redoc_url=None, openapi_url=None, lifespan=routes.lifespan)
    if settings.cors_origins:
        _let_pages_ask(app, settings.cors_origins)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await routes.answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await routes.answer(request, CompletionRequest)

    @app.api_route("/v1/models", methods=_READING)
    async def models(request: Request) -> Response:
        return routes.models(request)

    @app.api_route("/v1/models/{name}", methods=_READING)
    async def model(request: Request, name: str) -> Response:
        return routes.models(request, name)

    @app.api_route("/health", methods=_READING)
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.api_route("/metrics", methods=_READING)
    async def metrics(request: Request) -> Response:
        return routes.metrics(request)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, INVALID, str(error.detail), "not_found", headers=error.headers).to_response()

    @app.exception_handler(Refusal)
    @app.exception_handler(GaisnetError)
    async def refused(request: Request, error: Exception) -> Response:
        return _error_response(error)

    return app


def _let_pages_ask(app: FastAPI, origins: Sequence[str]) -> None:
    """Answer preflight requests, which browsers send before a page of another origin may ask."""
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=[*_READING, "POST"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
    )
