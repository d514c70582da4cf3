"""The interface of a link, all that tiers know of a network, and how to wait for a reply."""

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol, TypeVar

from gaisnet.errors import LinkTimeout
from gaisnet.messages import Message, expect

M = TypeVar("M", bound=Message)
_LOOK_S = 0.2


class Link(Protocol):
    """One end of a connection between two tiers, for requests to the other end."""

    @property
    def peer(self) -> str:
        """The incarnation of the other end, which forgets everything when it restarts; '' while it is away."""

    def send(self, message: Message) -> Future[Message]:
        """Send a request. The future gets the reply, a ``LinkError``, or the error that the other end raised."""


class Handler(Protocol):
    """The other end: a tier that answers requests."""

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``, at once or by a future. Raises ``UnexpectedMessage``."""


def wait_for(
    link: Link, reply: Future[Message], kind: type[M], asker: str, peer: str, deadline_s: float, away_s: float
) -> M:
    """Wait for the reply to a request.

    Args:
        link: The link that the request was sent on.
        reply: The future that ``send`` returned.
        kind: The expected kind of reply.
        asker: The waiting party, for errors.
        peer: The party at the other end, for errors.
        deadline_s: Seconds from now to wait at most.
        away_s: Seconds to wait for a peer that is away.

    Raises:
        LinkTimeout: The deadline passed, or the peer was away for too long; a late reply is dropped.
        UnexpectedMessage: The reply is of another kind.
        GaisnetError: Raised by the other end, or a ``LinkError``.
    """
    started = seen = time.monotonic()
    while True:
        try:
            return expect(reply.result(timeout=min(_LOOK_S, deadline_s)), kind, asker)
        except FutureTimeout:
            if reply.done():  # it came at this moment, or the other end raised a TimeoutError
                return expect(reply.result(), kind, asker)
        now = time.monotonic()
        seen = now if link.peer else seen
        if now - started > deadline_s or now - seen > away_s:
            reply.cancel()
            found = "away" if not link.peer else "no answer"
            asked = f"{asker}, waiting for a {kind.__name__} of {peer}"
            raise LinkTimeout(asked, f"{found} for {now - (seen if not link.peer else started):.0f} s")
