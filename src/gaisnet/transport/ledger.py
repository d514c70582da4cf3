"""Bytes per kind of link and direction. Up is toward the cloud."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

LinkKind = Literal["device_edge", "edge_cloud"]
Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Traffic:
    """What crossed one kind of link."""

    bytes_up: int
    bytes_down: int


class Ledger:
    """Counts every frame of a run."""

    def __init__(self) -> None:
        self._bytes: defaultdict[tuple[LinkKind, Direction], int] = defaultdict(int)

    def record(self, kind: LinkKind, direction: Direction, frame: bytes) -> None:
        """Count one frame."""
        self._bytes[kind, direction] += len(frame)

    def traffic(self, kind: LinkKind) -> Traffic:
        """Bytes so far."""
        return Traffic(self._bytes[kind, "up"], self._bytes[kind, "down"])
