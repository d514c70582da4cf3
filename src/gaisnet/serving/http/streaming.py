"""An answer in a thread of its own, with its text in the event loop of the caller."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from gaisnet.serving.generation.answering import Answer, Course


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
