"""Bytes per kind of link and direction. Up is toward the cloud."""

from dataclasses import dataclass
from threading import Lock
from typing import Literal

LinkKind = Literal["device_edge", "edge_cloud"]
Direction = Literal["up", "down"]


@dataclass(frozen=True)
class Traffic:
    """What crossed one kind of link."""

    bytes_up: int = 0
    bytes_down: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        """What crossed both."""
        return Traffic(self.bytes_up + other.bytes_up, self.bytes_down + other.bytes_down)


class Ledger:
    """Counts every frame of the requests that one site makes, and of their answers."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._traffic: dict[LinkKind, Traffic] = {"device_edge": Traffic(), "edge_cloud": Traffic()}

    def record(self, kind: LinkKind, direction: Direction, frame: bytes) -> None:
        """Count one frame."""
        size = len(frame)
        with self._lock:
            self._traffic[kind] += Traffic(size, 0) if direction == "up" else Traffic(0, size)

    def add(self, kind: LinkKind, traffic: Traffic) -> None:
        """Count what was counted elsewhere or in an earlier life."""
        with self._lock:
            self._traffic[kind] += traffic

    def traffic(self, kind: LinkKind) -> Traffic:
        """Bytes so far."""
        return self._traffic[kind]


def opposite(direction: Direction) -> Direction:
    """Where answers travel."""
    return "up" if direction == "down" else "down"
