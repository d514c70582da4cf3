"""Time that passes only when somebody waits: who is waited for, and for how long, is tested to the second, at once."""

import heapq
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from gaisnet.messages import Message

_TICK_S = 1e-6  # to look at the clock takes time as well


class Clock:
    """Stands in for ``time`` in the modules under test."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()

    def install(self, monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
        """Let ``modules`` see this time."""
        for module in modules:
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=self.monotonic, sleep=self.sleep))

    def after(self, seconds: float, do: Callable[[], object]) -> None:
        """Have something happen later."""
        heapq.heappush(self._due, (self.now + seconds, next(self._numbers), do))

    def monotonic(self) -> float:
        self.now += _TICK_S
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pass_until(self.now + seconds, lambda: False)

    def pass_until(self, until: float, enough: Callable[[], bool]) -> None:
        """Let everything happen that is due, up to ``until`` or ``enough``."""
        while not enough():
            if not self._due or self._due[0][0] > until:
                self.now = max(self.now, until)
                return
            when, _, do = heapq.heappop(self._due)
            self.now = max(self.now, when)
            do()


class Awaited(Future[Message]):
    """An answer; to wait for it lets the clock run."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            assert timeout is not None, "every wait has a deadline"
            self._clock.pass_until(self._clock.now + timeout, self.done)
        return super().result(timeout=0)

    def settle(self, outcome: Message | Exception) -> None:
        """Answer, unless nobody wants it any more."""
        if self.done() or not self.set_running_or_notify_cancel():
            return
        if isinstance(outcome, Exception):
            self.set_exception(outcome)
        else:
            self.set_result(outcome)
