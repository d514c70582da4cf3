"""Priority for computation on one machine: answers go first; training gets the rest, and at least its share.

A ``ComputeLock`` admits one computation at a time. Training is cut into small pieces, between which it *pauses*; a
pause costs nothing while no answer waits. ``PartitionedCores`` is for machines with several cores: answers and training
run at the same time, each on some of the cores.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Kind = Literal["serving", "learning"]
_MEMORY_S = 1.0
_RECENT_S = 1.0


class FairShare:
    """The time that training is owed: its share of all time in which it wants to run.

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
        """Count time in which training wanted to run, and whether it did."""
        owed_s = self._owed_s + self._share * seconds - (seconds if learning else 0.0)
        self._owed_s = min(max(owed_s, -self._memory_s), self._memory_s)

    @property
    def owed(self) -> bool:
        """Whether training may go before answers now."""
        return self._owed_s > 0.0


class _Ticket:
    """A place in one of the queues."""


class ComputeLock:
    """A reentrant lock with two queues, each first come, first served.

    Args:
        share: Share of time guaranteed to training while it wants to run.
        clock: Seconds.
    """

    def __init__(self, share: float = 0.5, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()  # guards everything below; held for moments
        self._queues: dict[Kind, deque[_Ticket]] = {"serving": deque(), "learning": deque()}
        self._holder: int | None = None  # a thread
        self._kind: Kind = "serving"
        self._depth = 0
        self._fair_share = FairShare(share)
        self._owed = False  # as it was at the last change of hands: who goes next must not change while they wake up
        self._since = 0.0

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the lock for an answer; it goes before all training that is not owed."""
        self._take("serving")
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Hold the lock for training; answers may run during a ``pause``, other training may not."""
        self._take("learning")
        try:
            yield
        finally:
            self._give_back()

    def pause(self) -> None:
        """Let waiting answers go first, unless training is owed time; does nothing in a thread that does not train."""
        if self._holder != threading.get_ident() or self._kind != "learning" or not self._queues["serving"]:
            return
        with self._changed:
            self._count()
            if not self._queues["serving"] or self._fair_share.owed:
                return
            depth, ticket = self._depth, _Ticket()
            self._queues["learning"].appendleft(ticket)  # before others: its piece of work is not at an end
            self._release()
            self._wait("learning", ticket)
            self._depth = depth

    @property
    def free(self) -> bool:
        """Whether the lock is free."""
        return self._holder is None

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
        self._holder, self._owed = None, self._fair_share.owed
        self._changed.notify_all()

    def _next(self) -> _Ticket | None:
        """Return the ticket that may go now."""
        serving, learning = self._queues["serving"], self._queues["learning"]
        if self._holder is not None:
            return None
        if serving and not (learning and self._owed):
            return serving[0]
        return learning[0] if learning else None

    def _count(self) -> None:
        """Charge the time since the last change."""
        now = self._clock()
        learns = self._holder is not None and self._kind == "learning"
        if learns or self._queues["learning"]:
            self._fair_share.passed(now - self._since, learns)
        self._since = now


class PartitionedCores(ComputeLock):
    """Answers and training at the same time, one thread of each; either has all cores while the other is idle.

    Args:
        share: Share of the cores for training while there are answers; each gets at least one.
        cores: Two or more.
        limit: Sets the number of cores of the calling thread.
        clock: Seconds.
    """

    def __init__(
        self, share: float, cores: int, limit: Callable[[int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(share, clock)
        self._cores = cores
        self._limit = limit
        learning = min(max(1, round(share * cores)), cores - 1)
        self._part: dict[Kind, int] = {"learning": learning, "serving": cores - learning}
        self._lanes: dict[Kind, ComputeLock] = {"learning": ComputeLock(), "serving": ComputeLock()}
        self._busy: dict[Kind, float] = {"learning": -_RECENT_S, "serving": -_RECENT_S}  # when it last had a turn
        self._limited = threading.local()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Hold the answers' cores."""
        with self._lane("serving", "learning"):
            yield

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Hold training's cores."""
        with self._lane("learning", "serving"):
            yield

    def pause(self) -> None:
        """Do nothing: answers do not wait for training."""

    @contextmanager
    def _lane(self, own: Kind, other: Kind) -> Iterator[None]:
        with self._lanes[own].serving():
            self._busy[own] = now = self._clock()
            alone = self._lanes[other].free and now - self._busy[other] >= _RECENT_S
            self._compute_on(self._cores if alone else self._part[own])
            try:
                yield
            finally:
                self._busy[own] = self._clock()

    def _compute_on(self, cores: int) -> None:
        """Set the number of cores if it differs; setting costs more than checking."""
        if getattr(self._limited, "cores", None) != cores:
            self._limit(cores)
            self._limited.cores = cores
