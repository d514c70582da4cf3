"""A link inside one process. Every message becomes bytes and back, so the ledger says what a network would carry."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from gaisnet.futures import as_future, failed
from gaisnet.messages import Message
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, GivenUp, coded
from gaisnet.transport.ledger import Direction, Ledger, LinkKind

A = TypeVar("A")


class _Direct:
    """Bytes to a tier in the same process."""

    peer = "here"

    def __init__(self, other_end: Handler, codec: Codec) -> None:
        self._answer = coded(other_end, codec)

    def send(self, payload: bytes) -> Future[bytes]:
        """Ask. The answer is there when this returns, unless the other end answers later."""
        try:
            return as_future(self._answer("here", payload))
        except Exception as error:
            return failed(error)


class LocalLink(CodedLink):
    """Asks ``other_end`` directly.

    Args:
        other_end: The tier that answers.
        codec: Writes and reads the frames.
        ledger: Where the frames are counted.
        kind: Which tiers the link joins.
        direction: Where requests travel; answers travel the other way.
    """

    def __init__(self, other_end: Handler, codec: Codec, ledger: Ledger, kind: LinkKind, direction: Direction) -> None:
        super().__init__(_Direct(other_end, codec), codec, ledger, kind, direction)

    def send(self, message: Message) -> Future[Message]:
        """See ``Link.send``. The answer is there when this returns, unless the other end answers later."""
        try:
            return super().send(message)
        except Exception as error:
            return failed(error)

    def _in_turn(self, begin: Callable[[], Future[Message]], is_long: bool) -> Future[Message]:
        """It is answered at once, so nothing can overtake it."""
        return begin()

    def _exchange(self, frame: bytes) -> Future[bytes]:
        """Counted before it is answered, so that frames are in the order in which they would be sent."""
        self._ledger.record(self._kind, self._direction, frame)
        return self._bytes_link.send(frame)

    def _aside(self, work: Callable[[GivenUp], A]) -> Future[A]:
        """In the thread that asks: whoever answers does so in it, too."""
        try:
            return as_future(work(lambda: False))
        except Exception as error:
            return failed(error)
