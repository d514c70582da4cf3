"""What every link can do. Tiers know only this."""

from typing import Protocol

from gaisnet.messages import Message


class Link(Protocol):
    """One end of a connection between two tiers, to ask the other end."""

    def request(self, message: Message) -> Message:
        """Send ``message`` and wait for its answer. Raises ``LinkError``."""


class Handler(Protocol):
    """The other end: a tier that answers."""

    def handle(self, message: Message) -> Message:
        """Answer ``message``. Raises ``UnexpectedMessage``."""
