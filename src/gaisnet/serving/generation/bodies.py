"""Where a device finds bodies: what whoever writes answers asks for, and what an engine gives it.

Shape legend: D hidden size, W positions that are wanted back.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from gaisnet.serving.engine.sessions import BodySession

Place = Literal["edge", "cloud"]


@dataclass(frozen=True)
class Target:
    """Which body, and what acts on it."""

    body: Place
    adapters: tuple[str, ...]  # names as the service knows them, () for none
    domain: str  # whose edge


class EscalatingSession(BodySession, Protocol):
    """A sequence that begins on a DM and may go on, once, on the FM, without a second uplink."""

    def escalate(self, adapters: tuple[str, ...], want: int) -> Tensor:
        """Give all positions so far to the FM too; the FM's output rows [W, D] of the last ``want`` of them.

        Later ``extend``, ``crop`` and ``close`` go to the FM. If it raises a ``GaisnetError``, nothing has changed: the
        session goes on where it was.

        Args:
            adapters: What acts on the FM, names as the service knows them.
            want: How many rows to give back.
        """


class Bodies(Protocol):
    """The bodies that a device reaches. May be called from any thread."""

    def open(self, target: Target, first: int, stop: int, num_positions: int) -> BodySession:
        """A session of layers [first, stop).

        Args:
            target: Which body.
            first: FM layer that takes the rows.
            stop: FM layer to stop before.
            num_positions: Memory to hold from the beginning: tokens of prompt and answer.

        Raises:
            GaisnetError: Full, unknown adapters, out of reach.
        """

    def open_escalating(self, target: Target, first: int, stop: int, num_positions: int) -> EscalatingSession:
        """The same at an edge, which keeps the rows that it gets, to forward them if it is asked to."""
