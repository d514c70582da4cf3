"""Sessions as messages: the end that has the body answers them, the end that writes sends them."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from gaisnet.errors import SessionClosed, UnexpectedMessage, WireFormatError
from gaisnet.messages import (
    CloseSession,
    CropSession,
    Done,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
)
from gaisnet.serving.body import BodyService

M = TypeVar("M", bound=Message)
Ask = Callable[[Message], Message]
"""Sends a message and waits for the answer; raises what the other end raised, or that it cannot be reached."""


class SessionEndpoint:
    """Answers one peer, who cannot touch the sessions of others. The service must have a thread that steps.

    Args:
        service: The body's.
        peer: For errors.
    """

    def __init__(self, service: BodyService, peer: str) -> None:
        self._service = service
        self._peer = peer
        self._own: set[str] = set()

    def handle(self, message: Message) -> Message:
        """Answer ``message``. Raises ``UnexpectedMessage``, or what the service raises."""
        match message:
            case OpenSession():
                asked = message.first, message.stop, message.adapters, message.num_positions
                self._own.add(name := self._service.open(*asked))
                return SessionOpened(name)
            case ExtendSession():
                name = self._check(message.session)
                answer = self._service.extend(name, message.rows_TD, message.want, message.position)
                return SessionRows(answer.result().float().cpu())
            case CropSession():
                self._service.crop(self._check(message.session), message.length)
                return Done()
            case CloseSession():
                if message.session in self._own:
                    self._own.discard(message.session)
                    self._service.close(message.session)
                return Done()
        raise UnexpectedMessage(f"the body service for '{self._peer}'", type(message).__name__)

    def close(self) -> None:
        """The peer is gone: end all its sessions."""
        while self._own:
            self._service.close(self._own.pop())

    def _check(self, name: str) -> str:
        if name not in self._own:
            raise SessionClosed(name)
        return name


class RemoteSession:
    """A session of a service at the other end; a ``BodySession``.

    Args:
        ask: The other end.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: What acts.
        num_positions: Memory to hold from the beginning.
    """

    def __init__(self, ask: Ask, first: int, stop: int, adapters: Sequence[str] = (), num_positions: int = 0) -> None:
        self._ask = ask
        opened = _expect(SessionOpened, ask(OpenSession(first, stop, tuple(adapters), num_positions)))
        self._name: str | None = opened.session
        self._length = 0

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions over there."""
        message = ExtendSession(self._open_name(), self._length, want, rows_TD.cpu())
        rows_WD = _expect(SessionRows, self._ask(message)).rows_WD
        if rows_WD.shape != (want, rows_TD.shape[1]):
            raise WireFormatError(f"output rows {tuple(rows_WD.shape)} where {(want, rows_TD.shape[1])} were asked for")
        self._length += len(rows_TD)
        return rows_WD

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        _expect(Done, self._ask(CropSession(self._open_name(), length)))
        self._length = length

    def close(self) -> None:
        """End the session over there."""
        if self._name is not None:
            name, self._name = self._name, None
            _expect(Done, self._ask(CloseSession(name)))

    def _open_name(self) -> str:
        if self._name is None:
            raise SessionClosed("of an answer that has ended")
        return self._name


def _expect(kind: type[M], answer: Message) -> M:
    if not isinstance(answer, kind):
        raise UnexpectedMessage(f"a session, waiting for a {kind.__name__},", type(answer).__name__)
    return answer
