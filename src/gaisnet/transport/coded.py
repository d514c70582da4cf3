"""Messages over links that carry bytes: both ends turn them into frames and back, and the one that asks counts them."""

from collections.abc import Callable
from concurrent.futures import Future

from gaisnet.errors import LinkError
from gaisnet.later import failed, then
from gaisnet.messages import Message
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Direction, Ledger, LinkKind, opposite
from gaisnet.transport.stream import ByteLink


class CodedLink:
    """A link for messages on top of one for bytes.

    Args:
        bytes_link: Carries the frames.
        codec: Writes and reads them.
        ledger: Where they are counted.
        kind: Which tiers the link joins.
        direction: Where requests travel; answers travel the other way.
    """

    def __init__(
        self, bytes_link: ByteLink, codec: Codec, ledger: Ledger, kind: LinkKind, direction: Direction
    ) -> None:
        self._bytes_link = bytes_link
        self._codec = codec
        self._ledger = ledger
        self._kind: LinkKind = kind
        self._direction: Direction = direction

    @property
    def peer(self) -> str:
        """See ``Link.peer``."""
        return self._bytes_link.peer

    def send(self, message: Message) -> Future[Message]:
        """See ``Link.send``."""
        frame = self._codec.encode(message)
        try:
            sent = self._bytes_link.send(frame)
        except LinkError as error:
            return failed(error)
        self._ledger.record(self._kind, self._direction, frame)
        return then(sent, self._arrived)

    def _arrived(self, frame: bytes) -> Message:
        self._ledger.record(self._kind, opposite(self._direction), frame)
        return self._codec.decode(frame)


def coded(handler: Handler, codec: Codec) -> Callable[[str, bytes], bytes | Future[bytes]]:
    """A tier as one that answers frames, whoever asks, now or later. What it raises comes through."""

    def answer(_asker: str, frame: bytes) -> bytes | Future[bytes]:
        reply = handler.handle(codec.decode(frame))
        return then(reply, codec.encode) if isinstance(reply, Future) else codec.encode(reply)

    return answer
