"""A link inside one process. Every message becomes bytes and back, so the ledger says what a network would carry."""

from gaisnet.messages import Message
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Direction, Ledger, LinkKind


class LocalLink:
    """Asks ``other_end`` directly.

    Args:
        other_end: The tier that answers.
        codec: Writes and reads the frames.
        ledger: Where the frames are counted.
        kind: Which tiers the link joins.
        direction: Where requests travel; answers travel the other way.
    """

    def __init__(self, other_end: Handler, codec: Codec, ledger: Ledger, kind: LinkKind, direction: Direction) -> None:
        self._other_end = other_end
        self._codec = codec
        self._ledger = ledger
        self._kind: LinkKind = kind
        self._there: Direction = direction
        self._back: Direction = "up" if direction == "down" else "down"

    def request(self, message: Message) -> Message:
        """See ``Link.request``."""
        answer = self._other_end.handle(self._cross(message, self._there))
        return self._cross(answer, self._back)

    def _cross(self, message: Message, direction: Direction) -> Message:
        frame = self._codec.encode(message)
        self._ledger.record(self._kind, direction, frame)
        return self._codec.decode(frame)
