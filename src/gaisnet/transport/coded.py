"""Messages over links that carry bytes: both ends turn them into frames and back, and the one that asks counts them."""

from collections.abc import Callable
from concurrent.futures import Future

from gaisnet.errors import LinkError
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
            refused: Future[Message] = Future()
            refused.set_exception(error)
            return refused
        self._ledger.record(self._kind, self._direction, frame)
        answer: Future[Message] = _Answer(sent)
        sent.add_done_callback(lambda done: self._arrived(done, answer))
        return answer

    def _arrived(self, sent: "Future[bytes]", answer: Future[Message]) -> None:
        if sent.cancelled() or not answer.set_running_or_notify_cancel():
            return
        try:
            frame = sent.result()
            self._ledger.record(self._kind, opposite(self._direction), frame)
            answer.set_result(self._codec.decode(frame))
        except Exception as error:  # in this thread nobody else would notice, and who waits would wait on
            answer.set_exception(error)


class _Answer(Future[Message]):
    """Cancelling it gives up the request."""

    def __init__(self, sent: "Future[bytes]") -> None:
        super().__init__()
        self._sent = sent

    def cancel(self) -> bool:
        self._sent.cancel()
        return super().cancel()


def coded(handler: Handler, codec: Codec) -> Callable[[str, bytes], bytes]:
    """A tier as one that answers frames, whoever asks. What it raises comes through."""
    return lambda _asker, frame: codec.encode(handler.handle(codec.decode(frame)))
