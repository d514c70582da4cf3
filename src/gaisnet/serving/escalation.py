"""A device's sessions at its edge: on its own body, on the foundation model's (FM), or first on one and then the other.

The device's rows fit both bodies. The edge keeps those of a session that may escalate, so that the FM's body can take
over without a second uplink; a session that the FM's body has is only passed on.
"""

from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol, TypeVar

from torch import Tensor

from gaisnet.errors import BodyUnreachable, SessionRefused, UnexpectedMessage
from gaisnet.later import failed, then, then_ask
from gaisnet.messages import (
    CloseSession,
    CropSession,
    EscalateSession,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
)
from gaisnet.serving.body import BodyService
from gaisnet.serving.endpoint import SessionEndpoint

M = TypeVar("M", bound=Message)
_FM = "the foundation model"


class Peer(Protocol):
    """Another site, as ``transport.base.Link`` has it."""

    @property
    def peer(self) -> str:
        """Names its present life; '' while it is away."""

    def send(self, message: Message) -> Future[Message]:
        """Ask."""


class EdgeSessions:
    """Answers one device. All methods may be called from any thread.

    Args:
        service: The edge's own body.
        cloud: Where the FM's body is.
        device: For errors.
    """

    def __init__(self, service: BodyService, cloud: Peer, device: str) -> None:
        self._service = service
        self._own = SessionEndpoint(service, device)
        self._cloud = cloud
        self._there: dict[str, str] = {}  # names of sessions that the FM's body has: here, and at the cloud
        self._moving: set[str] = set()  # between the two

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or what keeps it from being answered."""
        match message:
            case OpenSession(body="foundation"):
                return then(self._ask(replace(message, may_escalate=False)), self._opened)
            case EscalateSession():
                return self._escalate(message)
            case CloseSession():
                return self._close(message)
            case ExtendSession() | CropSession() if message.session in self._there:
                return self._ask(replace(message, session=self._there[message.session]))
            case ExtendSession() | CropSession() if message.session in self._moving:
                raise _on_its_way(message.session)
        return self._own.handle(message)

    def close(self) -> None:
        """The device is gone: end all its sessions."""
        self._moving.clear()
        self._own.close()
        while self._there:
            self._end(self._there.popitem()[1])

    def _opened(self, answer: Message) -> Message:
        opened = _expect(SessionOpened, answer)
        self._there[opened.session] = opened.session
        return opened

    def _close(self, message: CloseSession) -> Message | Future[Message]:
        self._moving.discard(message.session)
        there = self._there.pop(message.session, None)
        return self._own.handle(message) if there is None else self._ask(CloseSession(there))

    # -- from one body to the other

    def _escalate(self, message: EscalateSession) -> Future[Message]:
        name = message.session
        if name in self._there:
            raise SessionRefused(f"escalating session '{name}'", f"{_FM} has it", "go on")
        if name in self._moving:
            raise _on_its_way(name)
        rows_TD = self._service.rows(self._own.own(name))
        if not 0 < len(rows_TD) >= message.want:
            found = f"it has {len(rows_TD)}, {message.want} are wanted back"
            raise SessionRefused(f"the rows of session '{name}'", found, "send some first, and want no more")
        first, stop, reserved = self._service.place(name)
        self._moving.add(name)
        opened = self._ask(OpenSession(first, stop, message.adapters, reserved, "foundation"))
        moved = then_ask(opened, lambda answer: self._move(message, _expect(SessionOpened, answer).session, rows_TD))
        moved.add_done_callback(lambda _: self._moving.discard(name))
        return moved

    def _move(self, message: EscalateSession, there: str, rows_TD: Tensor) -> Future[Message]:
        """It is open over there: send what was kept. If that fails, everything is as it was."""
        sent = self._ask(ExtendSession(there, 0, message.want, rows_TD))
        sent.add_done_callback(lambda done: self._end(there) if done.cancelled() or done.exception() else None)
        return then(sent, lambda answer: self._arrived(message.session, there, answer))

    def _arrived(self, name: str, there: str, answer: Message) -> Message:
        rows = _expect(SessionRows, answer)
        if name not in self._moving:  # it was closed meanwhile
            self._end(there)
            return rows
        self._there[name] = there
        self._own.handle(CloseSession(name))
        return rows

    # -- the cloud

    def _ask(self, message: Message) -> Future[Message]:
        """Nobody waits here for a cloud that is away."""
        if not self._cloud.peer:
            return failed(BodyUnreachable(_FM, "the cloud is away"))
        return self._cloud.send(message)

    def _end(self, there: str) -> None:
        """Whether the cloud hears of it or has forgotten it with all else, it ends."""
        self._ask(CloseSession(there))


def _on_its_way(name: str) -> SessionRefused:
    return SessionRefused(f"session '{name}'", f"it is on its way to {_FM}", "take that answer first")


def _expect(kind: type[M], answer: Message) -> M:
    if not isinstance(answer, kind):
        raise UnexpectedMessage(f"an edge, waiting for a {kind.__name__} of the cloud,", type(answer).__name__)
    return answer
