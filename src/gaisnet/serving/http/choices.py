"""The answers to one request, one choice per prompt, written concurrently."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from gaisnet.serving.generation.answering import Course, GenerationRequest
from gaisnet.serving.http.streaming import StreamedAnswer


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

    async def first(self) -> None:
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

    async def whole(self) -> list[str]:
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
