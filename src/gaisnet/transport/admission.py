"""Admission of calls: how many one caller may have at once, and how many in a while; and of lines to the log."""

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """A quota of calls.

    Attributes:
        at_once: Calls of one caller under way together.
        burst: Calls that it may make in no time;
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
    """Counts the calls of each caller. All methods may be called from any thread, and none waits.

    Args:
        rate: Quota of each caller. A caller is the name in a certificate, so there are as many as sites.
    """

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._callers: dict[str, _Caller] = {}

    def enter(self, name: str) -> str:
        """Let a call in; '' where ``leave`` has to follow, else why it is refused."""
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
        """The call has ended."""
        with self._lock:
            self._callers[name].under_way -= 1


class OnceIn:
    """Says when something may be logged again, so that nobody can fill a log.

    Args:
        every_s: Seconds between two lines.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last: float | None = None
        self._lock = threading.Lock()

    def due(self) -> bool:
        """Whether it may be logged now; then not again for a while."""
        now = time.monotonic()
        with self._lock:
            quiet = self._last is not None and now - self._last < self._every_s
            self._last = self._last if quiet else now
        return not quiet
