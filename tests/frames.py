"""A ledger that keeps every frame, for tests of what crosses a link."""

from collections.abc import Iterator
from typing import TypeVar

from gaisnet.config import WireSettings
from gaisnet.messages import Message
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Direction, Ledger, LinkKind

M = TypeVar("M", bound=Message)


class Frames(Ledger):
    """Counts and keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[LinkKind, Direction, bytes]] = []

    def another(self) -> "Frames":
        """A ledger of another site, that keeps its frames with these."""
        ledger = Frames()
        ledger.frames = self.frames
        return ledger

    def record(self, kind: LinkKind, direction: Direction, frame: bytes) -> None:
        super().record(kind, direction, frame)
        self.frames.append((kind, direction, frame))

    def messages(self) -> Iterator[tuple[LinkKind, Direction, Message]]:
        """Every message with its link and direction."""
        codec = Codec(WireSettings())
        return ((kind, direction, codec.decode(frame)) for kind, direction, frame in self.frames)

    def of(self, kind: type[M]) -> list[M]:
        """Every message of a type."""
        return [message for _, _, message in self.messages() if isinstance(message, kind)]
