"""One connection of a link's end, and the threads that read and write it."""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Protocol

from gaisnet.errors import WireFormatError
from gaisnet.transport.session import Job

_PATIENCE_S = 0.01  # for a frame that can carry an acknowledgement


class End(Protocol):
    """The end of a link that a connection belongs to, as ``Endpoint`` has it."""

    other: str

    def ended(self, connection: "Connection") -> None:
        """The connection has ended."""

    def received(self, connection: "Connection", data: bytes) -> bool:
        """A frame came in; whether the thread that brings it shall read on. Raises ``WireFormatError``."""

    def takes_over(self, connection: "Connection") -> bool:
        """Whether another thread may read now, because the one that did is answering."""

    def ends(self, connection: "Connection") -> bool:
        """Nothing more will come in; whether the thread that reads is answering."""

    def rejected(self, found: str) -> None:
        """A connection is being closed for what came in on it."""

    def next_frame(self, connection: "Connection", patient: bool) -> bytes | None:
        """The next frame to send; None where there is none. Raises ``EOFError`` at the end of the connection."""


class Connection:
    """One connection of an endpoint, until it ends, for the two threads that read and write it."""

    def __init__(self, endpoint: End) -> None:
        self._endpoint = endpoint
        self._read: Callable[[], None] = lambda: None
        self.tokens: SimpleQueue[None] = SimpleQueue()
        self.send: Callable[[bytes], object] | None = None  # sends a frame from any thread, while no other one is sent
        self.idle = False  # the writer waits for a token, and nobody sends
        self.owes = False  # but not for long, for it has something to acknowledge
        self.answers: Job | None = None  # of the thread that reads, which shall read on when it is done
        self.ending = False  # so the thread that reads shall only read what has come
        self.problem = ""
        self.written = threading.Event()
        """Set when ``frames`` has come to its end."""

    def frames(self) -> Iterator[bytes]:
        """Frames to send, as they come, until the connection ends."""
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
        """Let a thread do ``read``, which calls ``self.read``; threads that take over from it do the same."""
        self._read = read
        self._start(read)

    def relieve_reader(self) -> None:
        """Let another thread read if the one that does so is answering; that one then ends when it has answered."""
        self._start(lambda: self._read() if self._endpoint.takes_over(self) else None)

    def _start(self, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"gaisnet reads {self._endpoint.other}", daemon=True).start()

    def read(self, frames: Iterator[bytes]) -> bool:
        """Receive until the connection ends or breaks the rules; then it is closed.

        Returns:
            Whether it is; otherwise another thread reads on.
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
        """Take note that nothing more will come in; whether the connection is closed now, else ``read`` closes it.

        It is where the thread that reads is answering, which may take long.
        """
        answers = self._endpoint.ends(self)
        if answers:
            self.close()
        return answers

    def close(self) -> None:
        """End the connection; may be called again, and from any thread."""
        self._endpoint.ended(self)
