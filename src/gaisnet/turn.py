"""Whose turn it is to compute on a machine: answers go first, learning has what is left, and at least its share.

One ``Turn`` stands for what can only be used by one at a time: the processors of a machine, and the bodies on them,
whose adapters are switched. Learning is cut into small pieces: between two of them it *pauses*, which costs nothing
while nobody waits.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Kind = Literal["serving", "learning"]
_MEMORY_S = 1.0


class Ration:
    """How much time learning is owed. It is owed its share of all time in which it wants to run.

    Idle time counts as well: where answers leave it more than its share, it takes nothing from them.

    Args:
        share: 0 to 1.
        memory_s: No more than this is owed, or has been had too much: what is long past does not matter.
    """

    def __init__(self, share: float, memory_s: float = _MEMORY_S) -> None:
        self._share = share
        self._memory_s = memory_s
        self._owed_s = 0.0

    def passed(self, seconds: float, learning: bool) -> None:
        """Time in which learning wanted to run, and whether it did."""
        owed_s = self._owed_s + self._share * seconds - (seconds if learning else 0.0)
        self._owed_s = min(max(owed_s, -self._memory_s), self._memory_s)

    @property
    def owed(self) -> bool:
        """Whether learning may go before answers now."""
        return self._owed_s > 0.0


class _Ticket:
    """A place in one of the queues."""


class Turn:
    """A lock with two queues, each first come, first served. Who holds it may take it again.

    Args:
        share: Of the time in which something wants to learn, what learning gets where answers would take it all.
        clock: Seconds.
    """

    def __init__(self, share: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below; held for moments
        self._queues: dict[Kind, deque[_Ticket]] = {"serving": deque(), "learning": deque()}
        self._holder: int | None = None  # a thread
        self._kind: Kind = "serving"
        self._depth = 0
        self._ration = Ration(share)
        self._owed = False  # as it was at the last change of hands: who goes next must not change while they wake up
        self._since = 0.0

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Inside, nobody else computes; goes before all learning that is not owed."""
        self._take("serving")
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside, nobody else computes, except answers during a ``pause``; other learning waits till the end."""
        self._take("learning")
        try:
            yield
        finally:
            self._give_back()

    def pause(self) -> None:
        """Let answers that wait go first, unless learning is owed time; does nothing but in a thread that learns."""
        if self._holder != threading.get_ident() or self._kind != "learning" or not self._queues["serving"]:
            return
        with self._changed:
            self._count()
            if not self._queues["serving"] or self._ration.owed:
                return
            depth, ticket = self._depth, _Ticket()
            self._queues["learning"].appendleft(ticket)  # before others: its piece of work is not at an end
            self._release()
            self._wait("learning", ticket)
            self._depth = depth

    def _take(self, kind: Kind) -> None:
        with self._changed:
            if self._holder == threading.get_ident():
                self._depth += 1
                return
            self._count()
            ticket = _Ticket()
            self._queues[kind].append(ticket)
            self._wait(kind, ticket)
            self._depth = 1

    def _give_back(self) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._count()
                self._release()

    # -- with the condition held

    def _wait(self, kind: Kind, ticket: _Ticket) -> None:
        try:
            self._changed.wait_for(lambda: self._next() is ticket)
        except BaseException:  # interrupted: nobody may wait for a ticket that nobody holds
            self._queues[kind].remove(ticket)
            self._changed.notify_all()
            raise
        self._count()
        self._queues[kind].remove(ticket)
        self._holder, self._kind = threading.get_ident(), kind

    def _release(self) -> None:
        self._holder, self._owed = None, self._ration.owed
        self._changed.notify_all()

    def _next(self) -> _Ticket | None:
        """Who may go now."""
        serving, learning = self._queues["serving"], self._queues["learning"]
        if self._holder is not None:
            return None
        if serving and not (learning and self._owed):
            return serving[0]
        return learning[0] if learning else None

    def _count(self) -> None:
        """Charge the time since somebody came or went."""
        now = self._clock()
        learns = self._holder is not None and self._kind == "learning"
        if learns or self._queues["learning"]:
            self._ration.passed(now - self._since, learns)
        self._since = now
