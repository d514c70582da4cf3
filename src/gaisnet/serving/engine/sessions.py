"""The interface of a session on a body, in this process or at the other end of a link."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from torch import Tensor

from gaisnet.serving.engine.body import BodyService


class BodySession(Protocol):
    """One sequence on a body."""

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions [T, D]; return the last ``want`` output rows. Raises a ``GaisnetError``."""

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""

    def close(self) -> None:
        """Close the session and free its memory; may be called more than once."""


@runtime_checkable
class SendingSession(Protocol):
    """A session that can also be asked without waiting, so that many answers in as many threads proceed together."""

    @property
    def deadline_s(self) -> float | None:
        """Seconds to wait for rows; None if they are certain to come or fail."""

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """Run new positions like ``BodySession.extend``; errors are raised here or by the future."""


class LocalSession:
    """A session of a service in this process.

    Args:
        service: The service.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: Adapters to activate.
        num_positions: Positions to reserve memory for.
    """

    def __init__(
        self, service: BodyService, first: int, stop: int, adapters: Sequence[str] = (), num_positions: int = 0
    ) -> None:
        self.deadline_s = None
        self._service = service
        self._name = service.open(first, stop, adapters, num_positions)

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """Run new positions; if no thread runs steps, the caller does."""
        answer = self._service.extend(self._name, rows_TD, want)
        while not self._service.in_thread and not answer.done():
            self._service.step()
        return answer

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions."""
        return self.send(rows_TD, want).result()

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""
        self._service.crop(self._name, length)

    def close(self) -> None:
        """Close the session."""
        self._service.close(self._name)
