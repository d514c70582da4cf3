"""Messages of sessions that generate answers."""

from dataclasses import dataclass

from pydantic import StrictBool, StrictInt
from torch import Tensor

from gaisnet.messages.message import Message, Whose, wire


@dataclass(frozen=True)
class OpenSession(Message):
    """Device -> edge -> cloud: open a session on layers [first, stop) of a body."""

    first: StrictInt
    stop: StrictInt
    adapters: tuple[str, ...]  # adapters to activate, in their current versions
    num_positions: StrictInt  # positions to reserve memory for: the prompt's and the answer's tokens
    body: Whose = "domain"  # the edge's own, or the FM's, to which it forwards the session
    may_escalate: StrictBool = False  # the edge keeps the rows, so that the FM's body can take over

    def __post_init__(self) -> None:
        if self.num_positions < 0:
            raise ValueError("a session cannot hold memory for fewer than no positions")


@dataclass(frozen=True)
class SessionOpened(Message):
    """Edge or cloud -> device: the session is open, under this name."""

    session: str
    adapters: tuple[str, ...] = ()  # active to its end, each as name@version


@dataclass(frozen=True)
class ExtendSession(Message):
    """Device -> edge -> cloud: run these positions; the reply is ``SessionRows``."""

    session: str
    position: StrictInt  # of the first row; if the session is elsewhere, nothing runs
    want: StrictInt  # number of last output rows that the tail needs
    rows_TD: Tensor = wire("session")  # float

    def __post_init__(self) -> None:
        if self.rows_TD.ndim != 2 or not 0 <= self.want <= len(self.rows_TD) or self.position < 0:
            raise ValueError("a session takes rows [T, D] at a position, and gives back at most as many")


@dataclass(frozen=True)
class SessionRows(Message):
    """Edge or cloud -> device: the body's output at the wanted positions."""

    rows_WD: Tensor = wire("session")  # float

    def __post_init__(self) -> None:
        if self.rows_WD.ndim != 2:
            raise ValueError("output rows must be [W, D]")


@dataclass(frozen=True)
class EscalateSession(Message):
    """Device -> edge: continue this session on the FM's body; the reply is its ``SessionRows``.

    The edge sends the cloud the rows that it has kept, and forwards later requests of the session.
    """

    session: str
    adapters: tuple[str, ...]  # adapters to activate there
    want: StrictInt  # number of last output rows that the tail needs

    def __post_init__(self) -> None:
        if self.want < 0:
            raise ValueError("a session gives back no fewer than no rows")


@dataclass(frozen=True)
class CropSession(Message):
    """Device -> edge -> cloud: drop the session's positions from ``length`` on."""

    session: str
    length: StrictInt


@dataclass(frozen=True)
class CloseSession(Message):
    """Device -> edge -> cloud: close the session."""

    session: str
