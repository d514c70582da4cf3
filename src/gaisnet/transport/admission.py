"""Quotas of calls per caller, concurrent and per time; and of log lines."""

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """A quota of calls.

    Attributes:
        at_once: Concurrent calls of one caller.
        burst: Calls that it may make at once;
        per_s: and how many more per second.
    """

    at_once: int
    burst: int
    per_s: float


@dataclass
class _Caller:
    spare: float  # calls that it may make now
    seen: float = field(default_factory=time.monotonic)
    under_way: int = 0


class Admission:
    """Counts the calls of each caller. Methods may be called from any thread, and never wait.

    Args:
        rate: Quota of each caller. A caller is the name in a certificate, so there are as many as sites.
    """

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._callers: dict[str, _Caller] = {}

    def enter(self, name: str) -> str:
        """Admit a call; return '' if ``leave`` must follow, else the reason for refusing it."""
        rate, now = self._rate, time.monotonic()
        with self._lock:
            caller = self._callers.setdefault(name, _Caller(rate.burst))
            caller.spare = min(rate.burst, caller.spare + (now - caller.seen) * rate.per_s)
            caller.seen = now
            if caller.under_way >= rate.at_once:
                return f"'{name}' has {caller.under_way} calls of this kind under way, and may have {rate.at_once}"
            if caller.spare < 1:
                return f"'{name}' makes more than {rate.per_s:g} calls of this kind a second"
            caller.spare -= 1
            caller.under_way += 1
            return ""

    def leave(self, name: str) -> None:
        """End a call."""
        with self._lock:
            self._callers[name].under_way -= 1


class OnceIn:
    """Limits how often a message is logged, so that nobody can fill a log.

    Args:
        every_s: Seconds between two lines.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last: float | None = None
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Return whether to log now; then not again for a while."""
        now = time.monotonic()
        with self._lock:
            quiet = self._last is not None and now - self._last < self._every_s
            self._last = self._last if quiet else now
        return not quiet
