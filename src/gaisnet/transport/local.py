"""A link inside one process. Every message becomes bytes and back, so the ledger says what a network would carry."""

from concurrent.futures import Future

from gaisnet.later import as_future, failed, then
from gaisnet.messages import Message
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Direction, Ledger, LinkKind, opposite


class LocalLink:
    """Asks ``other_end`` directly.

    Args:
        other_end: The tier that answers.
        codec: Writes and reads the frames.
        ledger: Where the frames are counted.
        kind: Which tiers the link joins.
        direction: Where requests travel; answers travel the other way.
    """

    peer = "here"

    def __init__(self, other_end: Handler, codec: Codec, ledger: Ledger, kind: LinkKind, direction: Direction) -> None:
        self._other_end = other_end
        self._codec = codec
        self._ledger = ledger
        self._kind: LinkKind = kind
        self._direction: Direction = direction

    def send(self, message: Message) -> Future[Message]:
        """See ``Link.send``. The answer is there when this returns, unless the other end answers later."""
        try:
            reply = self._other_end.handle(self._cross(message, self._direction))
        except Exception as error:
            return failed(error)
        return then(as_future(reply), lambda answer: self._cross(answer, opposite(self._direction)))

    def _cross(self, message: Message, direction: Direction) -> Message:
        frame = self._codec.encode(message)
        self._ledger.record(self._kind, direction, frame)
        return self._codec.decode(frame)
