"""Quotas: how much of a service's sessions, and of their memory, one peer may hold."""

from dataclasses import dataclass

from gaisnet.errors import QuotaReached


@dataclass(frozen=True)
class Quota:
    """One peer's part of a service.

    Attributes:
        peer: Common name of its certificate; nothing that it says of itself.
        share: Share of all sessions and of all their memory, in (0, 1]; one session is always allowed.
    """

    peer: str
    share: float

    def sessions(self, limit: int) -> int:
        """Sessions that the peer may have open, of ``limit``."""
        return max(1, int(self.share * limit))

    def check_sessions(self, open_now: int, limit: int) -> None:
        """Raise ``QuotaReached`` where the peer has as many sessions as it may have of ``limit``."""
        most = self.sessions(limit)
        if open_now >= most and self.share < 1.0:
            raise QuotaReached(self.peer, "a new session", f"it has {open_now} open, and one peer may have {most}")

    def check_bytes(self, held: int, more: int, limit: int) -> None:
        """Raise ``QuotaReached`` where ``more`` bytes, beside those ``held``, are above its share of ``limit``."""
        most = int(self.share * limit)
        if held + more > most and self.share < 1.0:
            found = f"it holds {held} bytes, needs {more} more, and one peer may hold {most}"
            raise QuotaReached(self.peer, "memory for a session", found)


NO_QUOTA = Quota("", 1.0)
"""For sessions of the machine's own."""
