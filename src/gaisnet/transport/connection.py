"""One connection of a link's end, and the threads that read and write it."""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Protocol

from gaisnet.errors import WireFormatError
from gaisnet.transport.session import Job

_PATIENCE_S = 0.01  # for a frame that can carry an acknowledgement


class End(Protocol):
    """The end of a link that a connection belongs to; ``Endpoint`` implements it."""

    other: str

    def ended(self, connection: "Connection") -> None:
        """Called when the connection has ended."""

    def received(self, connection: "Connection", data: bytes) -> bool:
        """Take a frame; return whether the reading thread shall read on. Raises ``WireFormatError``."""

    def takes_over(self, connection: "Connection") -> bool:
        """Return whether another thread may read, because the reading one is answering."""

    def ends(self, connection: "Connection") -> bool:
        """Note that nothing more will arrive; return whether the reading thread is answering."""

    def rejected(self, found: str) -> None:
        """Called when a connection is closed because of its content."""

    def next_frame(self, connection: "Connection", patient: bool) -> bytes | None:
        """Return the next frame to send; None if there is none. Raises ``EOFError`` at the end of the connection."""


class Connection:
    """One connection of an endpoint, until it ends, for the two threads that read and write it."""

    def __init__(self, endpoint: End) -> None:
        self._endpoint = endpoint
        self._read: Callable[[], None] = lambda: None
        self.tokens: SimpleQueue[None] = SimpleQueue()
        self.send: Callable[[bytes], object] | None = (
            None  # sends a frame from any thread, unless another one is being sent
        )
        self.idle = False  # the writer waits for a token, and nobody sends
        self.owes = False  # but not for long, because an acknowledgement is due
        self.answers: Job | None = None  # job of the reading thread, which reads on afterwards
        self.ending = False  # so the reading thread only reads what has arrived
        self.problem = ""
        self.written = threading.Event()
        """Set when ``frames`` has come to its end."""

    def frames(self) -> Iterator[bytes]:
        """Yield frames to send, as they come, until the connection ends."""
        patient = True
        try:
            while True:
                frame = self._endpoint.next_frame(self, patient)
                patient = True
                if frame is not None:
                    yield frame
                    continue
                try:
                    self.tokens.get(timeout=_PATIENCE_S if self.owes else None)
                except Empty:
                    patient = False
        except EOFError:
            return
        finally:
            self.written.set()

    def read_with(self, read: Callable[[], None]) -> None:
        """Let a thread run ``read``, which calls ``self.read``; threads that take over from it do the same."""
        self._read = read
        self._start(read)

    def relieve_reader(self) -> None:
        """Let another thread read if the reading one is answering; that one ends when it has answered."""
        self._start(lambda: self._read() if self._endpoint.takes_over(self) else None)

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"gaisnet reads {self._endpoint.other}", daemon=True).start()

    def read(self, frames: Iterator[bytes]) -> bool:
        """Receive until the connection ends or breaks the rules; then close it.

        Returns:
            Whether it is closed; otherwise another thread reads on.
        """
        reads_on = True
        try:
            for data in frames:
                reads_on = self._endpoint.received(self, data)
                if not reads_on:
                    break
        except WireFormatError as error:
            self.problem = str(error)
            self._endpoint.rejected(self.problem)
        finally:
            if reads_on:
                self.close()
        return reads_on

    def ends(self) -> bool:
        """Note that nothing more will arrive; return whether the connection is closed.

        It is closed here if the reading thread is answering, which may take long; otherwise ``read`` closes it.
        """
        answers = self._endpoint.ends(self)
        if answers:
            self.close()
        return answers

    def close(self) -> None:
        """End the connection; may be called again, and from any thread."""
        self._endpoint.ended(self)
