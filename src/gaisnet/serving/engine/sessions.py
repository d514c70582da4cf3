"""What whoever writes an answer sees of a body: one session of it, in this process or at the other end of a link."""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol, runtime_checkable

from torch import Tensor

from gaisnet.serving.engine.body import BodyService


class BodySession(Protocol):
    """One sequence on a body."""

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions [T, D]; the last ``want`` output rows. Raises a ``GaisnetError``."""

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on."""

    def close(self) -> None:
        """End, and free what is held. More than once does no harm."""


@runtime_checkable
class SendingSession(Protocol):
    """A session that can also be asked without waiting: many answers in as many threads then go on together."""

    @property
    def deadline_s(self) -> float | None:
        """How long rows are waited for; None where they come, or fail, for certain."""

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """As ``BodySession.extend``; it raises, or the future does."""


class LocalSession:
    """A session of a service in this process.

    Args:
        service: The body's.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: What acts.
        num_positions: Memory to hold from the beginning.
    """

    def __init__(
        self, service: BodyService, first: int, stop: int, adapters: Sequence[str] = (), num_positions: int = 0
    ) -> None:
        self.deadline_s = None
        self._service = service
        self._name = service.open(first, stop, adapters, num_positions)

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """Let new positions run; where no thread steps, the caller does."""
        answer = self._service.extend(self._name, rows_TD, want)
        while not self._service.in_thread and not answer.done():
            self._service.step()
        return answer

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions."""
        return self.send(rows_TD, want).result()

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        self._service.crop(self._name, length)

    def close(self) -> None:
        """End the session."""
        self._service.close(self._name)
