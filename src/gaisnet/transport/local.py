"""A link inside one process. Every message becomes bytes and back, so the ledger counts what a network would carry."""

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
        """Send a request. The reply is ready on return, unless the other end answers later."""
        try:
            return as_future(self._answer("here", payload))
        except Exception as error:
            return failed(error)


class LocalLink(CodedLink):
    """A link to ``other_end`` by direct calls.

    Args:
        other_end: The tier that answers.
        codec: Encodes and decodes the frames.
        ledger: Counts the frames.
        kind: The tiers that the link joins.
        direction: Direction of requests; replies travel the other way.
    """

    def __init__(self, other_end: Handler, codec: Codec, ledger: Ledger, kind: LinkKind, direction: Direction) -> None:
        super().__init__(_Direct(other_end, codec), codec, ledger, kind, direction)

    def send(self, message: Message) -> Future[Message]:
        """See ``Link.send``. The reply is ready on return, unless the other end answers later."""
        try:
            return super().send(message)
        except Exception as error:
            return failed(error)

    def _in_turn(self, begin: Callable[[], Future[Message]], is_long: bool) -> Future[Message]:
        """Do nothing: a request is answered at once, so nothing can overtake it."""
        return begin()

    def _exchange(self, frame: bytes) -> Future[bytes]:
        """Count a frame before it is answered, so that frames are in the order of a network."""
        self._ledger.record(self._kind, self._direction, frame)
        return self._bytes_link.send(frame)

    def _aside(self, work: Callable[[GivenUp], A]) -> Future[A]:
        """Run in the asking thread, like the answering end."""
        try:
            return as_future(work(lambda: False))
        except Exception as error:
            return failed(error)
