"""What the sessions of a service wait for, and who runs in its next step.

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
from gaisnet.serving.engine.cache import SessionCache
from gaisnet.serving.engine.quota import Quota
from gaisnet.serving.engine.rows import SessionShare


@dataclass
class Waiting:
    """Rows that a session has sent, and what has come of them so far."""

    rows_TD: Tensor
    want: int
    arrival: int
    answer: "Future[Tensor]" = field(default_factory=Future)
    done: int = 0
    outputs: list[Tensor] = field(default_factory=list)

    def take(self, rows_TD: Tensor) -> None:
        """Keep of the next outputs what is wanted: the last ``want`` rows of all."""
        surplus = max(0, len(self.rows_TD) - self.want - self.done)
        self.done += len(rows_TD)
        self.outputs.append(rows_TD[surplus:])

    @property
    def left(self) -> int:
        """Rows that have not run."""
        return len(self.rows_TD) - self.done

    def settle(self, outcome: Tensor | Exception) -> None:
        """Answer with the outputs, or with what went wrong."""
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
    reserved: int  # positions that memory is held for
    kept: list[Tensor] | None = None  # all rows that it was sent, where somebody may want them again
    cache: SessionCache = field(default_factory=SessionCache)
    queue: deque[Waiting] = field(default_factory=deque)
    running: bool = False
    late: bool = False  # it was waited for in vain, and has not come in time since
    closed: bool = False

    @property
    def length(self) -> int:
        """Positions that have run or wait to."""
        return self.cache.length + sum(waiting.left for waiting in self.queue)

    @property
    def held_bytes(self) -> int:
        """Memory that is held for it."""
        return self.reserved * self.position_bytes

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on; nothing waits."""
        self.cache.crop(length)
        if self.kept is not None:
            self.kept = [torch.cat(self.kept)[:length].clone()] if length else []

    def forget(self) -> None:
        """It has ended: what it held is free."""
        self.cache = SessionCache()
        self.kept = None


@dataclass(frozen=True)
class PlannedRows:
    """What a session runs in a step."""

    session: ServedSession
    waiting: Waiting
    rows_TD: Tensor

    def share(self) -> SessionShare:
        """The same for a forward."""
        s = self.session
        return SessionShare(self.rows_TD, s.cache, s.first, s.stop, s.adapters)


def plan(sessions: Iterable[ServedSession], settings: ServiceSettings) -> list[PlannedRows]:
    """Who runs, and what. Whoever waits longest comes first, so that nobody starves; then the short ones."""
    ready = sorted((s for s in sessions if s.queue), key=lambda s: s.queue[0].arrival)
    ready[1:] = sorted(ready[1:], key=lambda s: s.queue[0].left)
    budget, pieces = settings.step_rows, []
    for session in ready:
        waiting = session.queue[0]
        num_rows = min(waiting.left, settings.chunk, budget)
        if num_rows:
            pieces.append(PlannedRows(session, waiting, waiting.rows_TD[waiting.done : waiting.done + num_rows]))
        budget -= num_rows
    return pieces
