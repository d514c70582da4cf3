"""What a link that carries bytes between two processes can do, whatever it is made of."""

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol


class ByteLink(Protocol):
    """One end of a connection between two processes, to ask the other end. It outlives drops of the connection."""

    @property
    def peer(self) -> str:
        """Names the present life of the other end, which forgets everything when it restarts; '' while it is away."""

    def send(self, payload: bytes) -> Future[bytes]:
        """Ask; while the other end is away the request waits for it.

        The answer comes in time, or ``LinkLost`` (the other end restarted, or this one closed the link), or
        ``PeerError`` (it could not answer). ``cancel()`` gives the request up: it is not sent again, and a late
        answer is dropped. Callbacks of the future run in the thread that reads the connection and must not wait.

        Raises:
            MessageTooLarge: The payload is above the limit.
        """


@dataclass(frozen=True)
class Limits:
    """What one end of a link takes from the other, which may be hostile. Both ends use the same ones.

    Attributes:
        part_bytes: Longest piece of a payload in one frame.
        max_message_bytes: Longest payload, and the most bytes that unanswered requests may hold together.
        max_dialer_bytes: The same for requests of the end that dials, where it is less.
        max_requests: Most requests of one end that wait for their answers at the other; more wait where they are asked.
        keepalive_s: A connection that has been silent for this long is asked whether it is there,
        keepalive_timeout_s: and is taken for dead if it says nothing for this long.
    """

    part_bytes: int = 2**20
    max_message_bytes: int = 2**31 - 1
    max_dialer_bytes: int = 2**31 - 1
    max_requests: int = 64
    keepalive_s: float = 10.0
    keepalive_timeout_s: float = 20.0

    def request_bytes(self, dials: bool) -> int:
        """Bytes that the unanswered requests of one end may hold together, of the end that dials or of the other."""
        return min(self.max_message_bytes, self.max_dialer_bytes) if dials else self.max_message_bytes


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class LinkState:
    """How a link is, as one of its ends sees it.

    Attributes:
        connected: The other end has said who it is on a connection that stands.
        since_s: Seconds for which it has been so.
        last_seen_s: Seconds since the last frame came in; None before the first.
        life: Hex id of the other end's life, the last one where it is away; '' before the first.
        rejected_frames: Connections that were closed for a frame that is none, or one that may not come there.
        problem: Why the last connection ended; '' where none has, or where it was closed in order.
    """

    connected: bool
    since_s: float
    last_seen_s: float | None
    incarnation: str
    rejected_frames: int
    problem: str
