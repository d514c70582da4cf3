"""What every link can do. Tiers know only this."""

import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Protocol

from gaisnet.errors import LinkTimeout
from gaisnet.messages import Message

_LOOK_S = 0.2


class Link(Protocol):
    """One end of a connection between two tiers, to ask the other end."""

    @property
    def peer(self) -> str:
        """Names the present life of the other end, which forgets everything when it restarts; '' while it is away."""

    def send(self, message: Message) -> Future[Message]:
        """Ask; the answer comes in time, or a ``LinkError``, or what the other end raised."""


class Handler(Protocol):
    """The other end: a tier that answers."""

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``, now or when the answer is there. Raises ``UnexpectedMessage``."""


def wait(link: Link, answer: Future[Message], asked: str, deadline_s: float, away_s: float) -> Message:
    """The answer to what was asked.

    Args:
        link: Where it was sent.
        answer: What ``send`` gave.
        asked: For the error: whom, and what for.
        deadline_s: Seconds from now after which nobody waits any longer.
        away_s: Seconds after which an end that is away is waited for no longer.

    Raises:
        LinkTimeout: Too late, or away for too long; a late answer is dropped.
        GaisnetError: What the other end raised, or ``LinkError``.
    """
    started = seen = time.monotonic()
    while True:
        try:
            return answer.result(timeout=min(_LOOK_S, deadline_s))
        except FutureTimeout:
            if answer.done():  # it came at this moment, or the other end raised a TimeoutError
                return answer.result()
        now = time.monotonic()
        seen = now if link.peer else seen
        if now - started > deadline_s or now - seen > away_s:
            answer.cancel()
            found = "away" if not link.peer else "no answer"
            raise LinkTimeout(asked, f"{found} for {now - (seen if not link.peer else started):.0f} s")
