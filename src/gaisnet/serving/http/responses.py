"""Responses in OpenAI's format: answers written in threads, joined to choices, and wrapped for the client."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from gaisnet.serving.generation.answering import Answer, Course, GenerationRequest


@dataclass(frozen=True)
class _End:
    """End of the text, with an error if there was one."""

    error: Exception | None = None


class StreamedAnswer:
    """An answer, begun at once. Every method is called in the event loop.

    Args:
        pool: Provides the thread.
        begin: Opens the answer; called in the thread.
        ended: Called in the event loop when the thread is free again.
    """

    def __init__(
        self, pool: ThreadPoolExecutor, begin: Callable[[], Answer], ended: Callable[["StreamedAnswer"], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | _End] = asyncio.Queue()
        self._begin = begin
        self._ended = ended
        self._answer: Answer | None = None
        self._stopped = False
        self.error: Exception | None = None
        self._thread = self._loop.run_in_executor(pool, self._work)

    @property
    def begun(self) -> bool:
        """Whether the answer was opened, finished or not."""
        return self._answer is not None

    @property
    def course(self) -> Course:
        """Its course; available as soon as there is text."""
        if self._answer is None:
            raise RuntimeError("an answer was asked how it goes before it had begun")
        return self._answer.course

    @property
    def stopped(self) -> bool:
        """Whether the rest was abandoned."""
        return self._stopped

    async def text(self) -> AsyncIterator[str]:
        """Yield pieces as they come. Raises the answer's error."""
        while True:
            piece = await self._pieces.get()
            if isinstance(piece, _End):
                if piece.error is not None:
                    raise piece.error
                return
            yield piece

    def stop(self) -> None:
        """Abandon the rest and free sessions at once; does nothing if it has ended."""
        if self._stopped or self._thread.done():
            return
        self._stopped = True
        if self._answer is not None:
            self._loop.run_in_executor(None, self._answer.close)  # a remote body may take its time

    def _work(self) -> None:
        """Run in the thread."""
        end = _End()
        try:
            if not self._stopped:
                self._write()
        except Exception as error:
            self.error = error
            end = _End(error)
        self._tell(end)

    def _write(self) -> None:
        self._answer = answer = self._begin()
        try:
            if not self._stopped:  # stop may have come before the answer could be closed
                for piece in answer:
                    self._tell(piece)
        finally:
            answer.close()

    def _tell(self, piece: str | _End) -> None:
        try:
            self._loop.call_soon_threadsafe(self._take, piece)
        except RuntimeError:  # the loop is closed: the server ended first
            self._stopped = True

    def _take(self, piece: str | _End) -> None:
        self._pieces.put_nowait(piece)
        if isinstance(piece, _End):
            self._ended(self)


@dataclass(frozen=True)
class ChoiceText:
    """A piece of a choice's text; None at its end."""

    index: int
    text: str | None


class Choices:
    """Concurrent answers, begun at once. Every method is called in the event loop.

    Args:
        asks: One generation request per choice.
        start: Begins an answer, or raises if there is no room.
        room: Waits until there may be room for one more.
    """

    def __init__(
        self,
        asks: Sequence[GenerationRequest],
        start: Callable[[GenerationRequest], StreamedAnswer],
        room: Callable[[], Awaitable[None]],
    ) -> None:
        self._start = start
        self._room = room
        self._running: list[StreamedAnswer | None] = [None] * len(asks)
        self._pieces: asyncio.Queue[ChoiceText | Exception] = asyncio.Queue()
        self._running[0] = start(asks[0])  # if not even this one can begin, the request is refused
        self._tasks = [asyncio.create_task(self._follow(i, ask)) for i, ask in enumerate(asks)]
        self._ahead: ChoiceText | Exception | None = None

    @property
    def courses(self) -> list[Course]:
        """Courses of all answers, each of which must have begun."""
        return [self.course(index) for index in range(len(self._running))]

    def course(self, index: int) -> Course:
        """Course of an answer that has begun."""
        running = self._running[index]
        if running is None:
            raise RuntimeError("an answer was asked how it goes before it had begun")
        return running.course

    async def wait_for_first(self) -> None:
        """Wait for the first text, or end, of any choice. Raises its error."""
        self._ahead = await self._pieces.get()
        if isinstance(self._ahead, Exception):
            raise self._ahead

    async def pieces(self) -> AsyncIterator[ChoiceText]:
        """Yield pieces of all choices as they come. Raises the error of the first that fails."""
        left = len(self._running)
        while left:
            piece, self._ahead = self._ahead if self._ahead is not None else await self._pieces.get(), None
            if isinstance(piece, Exception):
                raise piece
            left -= piece.text is None
            yield piece

    async def collect_texts(self) -> list[str]:
        """Return the text of each choice. Raises the error of the first that fails."""
        texts = [""] * len(self._running)
        async for piece in self.pieces():
            texts[piece.index] += piece.text or ""
        return texts

    def stop(self) -> None:
        """Free all sessions at once; does nothing if all have ended."""
        for task in self._tasks:
            task.cancel()
        for running in self._running:
            if running is not None:
                running.stop()

    async def _follow(self, index: int, ask: GenerationRequest) -> None:
        try:
            running = self._running[index] or await self._begun(index, ask)
            async for text in running.text():
                self._pieces.put_nowait(ChoiceText(index, text))
            self._pieces.put_nowait(ChoiceText(index, None))
        except Exception as error:
            self._pieces.put_nowait(error)

    async def _begun(self, index: int, ask: GenerationRequest) -> StreamedAnswer:
        """Begin an answer beside others of the same request, which make room for it if nobody else does."""
        await self._room()
        running = self._running[index] = self._start(ask)
        return running


def usage_of(courses: Sequence[Course]) -> dict[str, int]:
    """Return the tokens of all prompts and answers."""
    prompt = sum(course.num_prompt_tokens for course in courses)
    written = sum(course.num_tokens for course in courses)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def course_of(course: Course) -> dict[str, Any]:
    """Return our own field: the body that wrote."""
    said: dict[str, Any] = {"body": course.now, "domain": course.domain, "escalated_at": course.escalated_at}
    if course.cloud_refused:
        said["cloud_refused"] = True
    if course.tally is not None:
        tally = course.tally
        said |= {"drafted": tally.num_drafted, "accepted": tally.num_accepted, "checks": tally.num_checks}
    return said


@dataclass(frozen=True)
class Envelope:
    """Common fields of the responses to one request. ``kind`` is 'chat' or 'text'."""

    kind: Literal["chat", "text"]
    model: str
    id: str
    created: int

    @classmethod
    def for_request(cls, kind: Literal["chat", "text"], model: str) -> "Envelope":
        """Make an envelope with an unguessable id."""
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, model, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def full_response(self, texts: Sequence[str], courses: Sequence[Course]) -> dict[str, Any]:
        """Return the response to a request that does not stream: a choice per prompt.

        Our own field stands beside a single choice, and inside each of several.
        """
        choices = [self._choice(*each) for each in zip(range(len(texts)), texts, courses, strict=True)]
        said = {"gaisnet": course_of(courses[0])}
        if len(courses) > 1:
            choices = [choice | {"gaisnet": course_of(of)} for choice, of in zip(choices, courses, strict=True)]
            said = {}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._top(name), "choices": choices, "usage": usage_of(courses), **said}

    def _choice(self, index: int, text: str, course: Course) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": course.finish_reason, "logprobs": None}
        if self.kind == "chat":
            return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return choice | {"text": text}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Return the chunks before all text."""
        if self.kind == "chat":
            yield self._chunk(0, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def text_chunk(self, index: int, text: str, course: Course) -> dict[str, Any]:
        """Return a chunk of a choice's text, and the body that writes."""
        choice = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return {**self._chunk(index, {**choice, "finish_reason": None}), "gaisnet": {"body": course.now}}

    def last_chunk(self, index: int, course: Course) -> dict[str, Any]:
        """Return the chunk after all text of a choice."""
        choice: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return {
            **self._chunk(index, {**choice, "finish_reason": course.finish_reason}),
            "gaisnet": course_of(course),
        }

    def usage_chunk(self, courses: Sequence[Course]) -> dict[str, Any]:
        """Return the chunk after all choices, for a stream that reports usage."""
        return {**self._chunk(0, None), "usage": usage_of(courses)}

    def _chunk(self, index: int, choice: Mapping[str, Any] | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        choices = [] if choice is None else [{"index": index, "logprobs": None, **choice}]
        return {**self._top(name), "choices": choices}

    def _top(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}
