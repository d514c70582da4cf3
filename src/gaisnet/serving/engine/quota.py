"""Quotas: the sessions and memory of a service that one peer may use."""

from dataclasses import dataclass

from gaisnet.errors import QuotaReached


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
