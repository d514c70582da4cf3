"""Access of a device to bodies: the interface that generation uses and engines implement.

Shape legend: D hidden size, W wanted output rows.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from gaisnet.serving.engine.sessions import BodySession

Place = Literal["edge", "cloud"]


@dataclass(frozen=True)
class Target:
    """A body and its active adapters."""

    body: Place
    adapters: tuple[str, ...]  # names as the service knows them, () for none
    domain: str  # domain of the edge


class EscalatingSession(BodySession, Protocol):
    """A sequence that begins on a DM and may continue, once, on the FM, without a second uplink."""

    def escalate(self, adapters: tuple[str, ...], want: int) -> Tensor:
        """Forward all positions so far to the FM; return the FM's output rows [W, D] of the last ``want`` of them.

        Later ``extend``, ``crop`` and ``close`` go to the FM. After a ``GaisnetError`` nothing has changed: the
        session goes on where it was.

        Args:
            adapters: Adapters to activate on the FM, named as the service knows them.
            want: Number of rows to return.
        """


class Bodies(Protocol):
    """The bodies that a device reaches. Methods may be called from any thread."""

    def open(self, target: Target, first: int, stop: int, num_positions: int) -> BodySession:
        """Open a session of layers [first, stop).

        Args:
            target: The body and its adapters.
            first: FM layer that takes the rows.
            stop: FM layer to stop before.
            num_positions: Positions to reserve memory for: tokens of prompt and answer.

        Raises:
            GaisnetError: Full, unknown adapters, unreachable.
        """

    def open_escalating(self, target: Target, first: int, stop: int, num_positions: int) -> EscalatingSession:
        """Open such a session at an edge that keeps received rows, to forward them on escalation."""
