"""The interface of a link that carries bytes between two processes."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


class ByteLink(Protocol):
    """One end of a connection between two processes, for requests to the other end.

    It outlives drops of the connection.
    """

    @property
    def peer(self) -> str:
        """Incarnation of the other end, which forgets everything when it restarts; '' while it is away."""

    def send(self, payload: bytes) -> Future[bytes]:
        """Send a request; while the other end is away it waits.

        The future gets the reply, or ``LinkLost`` (the other end restarted, or this one closed the link), or
        ``PeerError`` (it could not answer). ``cancel()`` abandons the request: it is not sent again, and a late
        reply is dropped. Callbacks of the future run in the reading thread and must not wait.

        Raises:
            MessageTooLarge: The payload is above the limit.
        """


@dataclass(frozen=True)
class Limits:
    """Limits of one end on the other, which may be hostile. Both ends use the same ones.

    Attributes:
        part_bytes: Longest piece of a payload in one frame.
        max_message_bytes: Longest payload, and the most bytes of all unanswered requests.
        max_dialer_bytes: The same for requests of the dialing end, if it is less.
        max_requests: Most unanswered requests of one end at the other; more wait at the asking end.
        keepalive_s: Seconds of silence after which a connection is probed,
        keepalive_timeout_s: and seconds without a response after which it counts as dead.
    """

    part_bytes: int = 2**20
    max_message_bytes: int = 2**31 - 1
    max_dialer_bytes: int = 2**31 - 1
    max_requests: int = 64
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 20.0

    def request_bytes(self, dials: bool) -> int:
        """Return the most bytes of one end's unanswered requests: the dialing end's or the other's."""
        return min(self.max_message_bytes, self.max_dialer_bytes) if dials else self.max_message_bytes


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class LinkState:
    """State of a link, as one of its ends sees it.

    Attributes:
        connected: Whether the other end has identified itself on a live connection.
        since_s: Seconds since that changed.
        last_seen_s: Seconds since the last frame arrived; None before the first.
        incarnation: Hex id of the other end's incarnation, the last one while it is away; '' before the first.
        rejected_frames: Connections that were closed for an invalid or unexpected frame.
        problem: Why the last connection ended; '' if none has, or it was closed in order.
    """

    connected: bool
    since_s: float
    last_seen_s: float | None
    incarnation: str
    rejected_frames: int
    problem: str
