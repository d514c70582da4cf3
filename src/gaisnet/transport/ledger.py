"""Bytes per kind of link and direction. Up is toward the cloud."""

from dataclasses import dataclass
from threading import Lock
from typing import Literal

LinkKind = Literal["device_edge", "edge_cloud"]
Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Traffic:
    """Bytes on one kind of link."""

    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Add the bytes of two."""
        return Traffic(self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down)


class Ledger:
    """Counts every frame of one site's requests and their replies."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._traffic: dict[LinkKind, Traffic] = {"device_edge": Traffic(), "edge_cloud": Traffic()}

    def record(self, kind: LinkKind, direction: Direction, frame: bytes) -> None:
        """Count one frame."""
        size = len(frame)
        with self._lock:
            self._traffic[kind] += Traffic(size, 0) if direction == "up" else Traffic(0, size)

    def add(self, kind: LinkKind, traffic: Traffic) -> None:
        """Add bytes that were counted elsewhere or by an earlier incarnation."""
        with self._lock:
            self._traffic[kind] += traffic

    def traffic(self, kind: LinkKind) -> Traffic:
        """Return the bytes so far."""
        return self._traffic[kind]


def opposite(direction: Direction) -> Direction:
    """Return the direction of replies."""
    return "up" if direction == "down" else "down"
