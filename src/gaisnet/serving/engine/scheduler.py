"""Scheduling: quotas of peers, rows that sessions wait for, and the batch of the next step.

Shape legend: T rows (new positions) of one session, D hidden size.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gaisnet.adapters.mixing import Stack
from gaisnet.config import ServiceSettings
from gaisnet.errors import QuotaReached
from gaisnet.serving.engine.rows import BatchEntry, KVCache


@dataclass(frozen=True)
class Quota:
    """One peer's part of a service.

    Attributes:
        peer: Common name of its certificate, never a name that it claims.
        share: Share of all sessions and of all their memory, in (0, 1]; one session is always allowed.
    """

    peer: str
    share: float

    def sessions(self, limit: int) -> int:
        """Return the number of sessions, of ``limit``, that the peer may have open."""
        return max(1, int(self.share * limit))

    def check_sessions(self, open_now: int, limit: int) -> None:
        """Raise ``QuotaReached`` if the peer has all the sessions that it may have of ``limit``."""
        most = self.sessions(limit)
        if open_now >= most and self.share < 1.0:
            raise QuotaReached(self.peer, "a new session", f"it has {open_now} open, and one peer may have {most}")

    def check_bytes(self, held: int, more: int, limit: int) -> None:
        """Raise ``QuotaReached`` if ``more`` bytes, beside those ``held``, exceed its share of ``limit``."""
        most = int(self.share * limit)
        if held + more > most and self.share < 1.0:
            found = f"it holds {held} bytes, needs {more} more, and one peer may hold {most}"
            raise QuotaReached(self.peer, "memory for a session", found)


NO_QUOTA = Quota("", 1.0)
"""For sessions of the machine's own."""


@dataclass
class PendingRows:
    """Rows that a session has sent, and their outputs so far."""

    rows_TD: Tensor
    want: int
    arrival: int
    answer: "Future[Tensor]" = field(default_factory=Future)
    done: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    def add_outputs(self, rows_TD: Tensor) -> None:
        """Keep the wanted part of the next outputs: the last ``want`` rows of all."""
        surplus = max(0, len(self.rows_TD) - self.want - self.done)
        self.done += len(rows_TD)
        self.outputs.append(rows_TD[surplus:])

    @property
    def left(self) -> int:
        """Number of rows that have not run."""
        return len(self.rows_TD) - self.done

    def settle(self, outcome: Tensor | Exception) -> None:
        """Answer with the outputs, or with an error."""
        if not self.answer.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(torch.cat(self.outputs))


@dataclass
class ServedSession:
    """One sequence, on some layers."""

    name: str
    quota: Quota
    first: int
    stop: int
    adapters: Stack
    position_bytes: int
    reserved: int  # positions with reserved memory
    kept: list[Tensor] | None = None  # all received rows, if they may be needed again
    cache: KVCache = field(default_factory=KVCache)
    queue: deque[PendingRows] = field(default_factory=deque)
    running: bool = False
    late: bool = False  # a step waited for it in vain, and it has not been punctual since
    closed: bool = False

    @property
    def length(self) -> int:
        """Positions that have run or wait to."""
        return self.cache.length + sum(waiting.left for waiting in self.queue)

    @property
    def held_bytes(self) -> int:
        """Memory in use by this session."""
        return self.reserved * self.position_bytes

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on; nothing waits."""
        self.cache.crop(length)
        if self.kept is not None:
            self.kept = [torch.cat(self.kept)[:length].clone()] if length else []

    def forget(self) -> None:
        """Free everything, after the session has ended."""
        self.cache = KVCache()
        self.kept = None


@dataclass(frozen=True)
class ScheduledRows:
    """The rows that a session runs in a step."""

    session: ServedSession
    waiting: PendingRows
    rows_TD: Tensor

    def share(self) -> BatchEntry:
        """Return the session's part of a forward pass."""
        s = self.session
        return BatchEntry(self.rows_TD, s.cache, s.first, s.stop, s.adapters)


def schedule(sessions: Iterable[ServedSession], settings: ServiceSettings) -> list[ScheduledRows]:
    """Choose sessions and rows of a step: the longest waiting first, so that none starves, then the short ones."""
    ready = sorted((s for s in sessions if s.queue), key=lambda s: s.queue[0].arrival)
    ready[1:] = sorted(ready[1:], key=lambda s: s.queue[0].left)
    budget, pieces = settings.step_rows, []
    for session in ready:
        waiting = session.queue[0]
        num_rows = min(waiting.left, settings.chunk, budget)
        if num_rows:
            pieces.append(ScheduledRows(session, waiting, waiting.rows_TD[waiting.done : waiting.done + num_rows]))
        budget -= num_rows
    return pieces
