"""A device's sessions at its edge: on its own body, on the foundation model's (FM), or first on one, then on the other.

The device's rows fit both bodies. The edge keeps those of a session that may escalate, so that the FM's body can take
over without a second uplink. Messages of a session on the FM's body are only forwarded.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol, TypeVar

from torch import Tensor

from gaisnet.errors import BodyUnreachable, SessionClosed, SessionRefused
from gaisnet.futures import failed, flat_map, map_result
from gaisnet.messages import (
    CloseSession,
    CropSession,
    EscalateSession,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
    expect,
)
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.endpoint import SessionEndpoint
from gaisnet.serving.engine.scheduler import Quota

M = TypeVar("M", bound=Message)
_FM = "the foundation model"


class Peer(Protocol):
    """Another site, with the interface of ``transport.base.Link``."""

    @property
    def peer(self) -> str:
        """Its incarnation; '' while it is away."""

    def send(self, message: Message) -> Future[Message]:
        """Send a request."""


class EdgeSessions:
    """Answers one device. All methods may be called from any thread.

    Args:
        service: The edge's own body.
        cloud: The site with the FM's body.
        device: The device's name, from its certificate.
        share: Share of the edge's sessions and memory, and of the edge's sessions at the cloud, that the device may
            use.
        max_at_cloud: Most sessions of the edge at the cloud; None if only the cloud's limit counts.
    """

    def __init__(
        self, service: BodyService, cloud: Peer, device: str, share: float = 1.0, max_at_cloud: int | None = None
    ) -> None:
        self._service = service
        self._own = SessionEndpoint(service, device, share)
        self._cloud = cloud
        self._quota = Quota(device, share)
        self._max_at_cloud = max_at_cloud
        self._there: dict[str, str] = {}  # names of sessions on the FM's body: here, and at the cloud
        self._moving: set[str] = set()  # being moved between the two
        self._opening = 0  # being opened at the cloud
        self._closed = False
        self._lock = threading.Lock()

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or the reason for a refusal."""
        match message:
            case OpenSession(body="foundation"):
                there = replace(message, may_escalate=False)
                return self._counted(lambda: map_result(self._ask(there), self._opened))
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
        """Close all sessions of a device that is gone, including those being opened."""
        with self._lock:
            self._closed, there, self._there = True, list(self._there.values()), {}
        self._moving.clear()
        self._own.close()
        for name in there:
            self._end(name)

    def _opened(self, answer: Message) -> Message:
        opened = _expect(SessionOpened, answer)
        self._keep(opened.session, opened.session)
        return opened

    def _keep(self, name: str, there: str) -> None:
        """Record a session at the cloud. Raises ``SessionClosed`` if the device is gone."""
        with self._lock:
            if not self._closed:
                self._there[name] = there
                return
        self._end(there)
        raise SessionClosed(name)

    def _close(self, message: CloseSession) -> Message | Future[Message]:
        self._moving.discard(message.session)
        there = self._there.pop(message.session, None)
        return self._own.handle(message) if there is None else self._end(there)

    # -- from one body to the other

    def _escalate(self, message: EscalateSession) -> Future[Message]:
        name = message.session
        if name in self._there:
            raise SessionRefused(f"escalating session '{name}'", f"{_FM} has it", "go on")
        if name in self._moving:
            raise _on_its_way(name)
        rows_TD = self._service.received_rows(self._own.own(name))
        if not 0 < len(rows_TD) >= message.want:
            found = f"it has {len(rows_TD)}, {message.want} are wanted back"
            raise SessionRefused(f"the rows of session '{name}'", found, "send some first, and want no more")
        return self._counted(lambda: self._open_and_move(message, rows_TD))

    def _open_and_move(self, message: EscalateSession, rows_TD: Tensor) -> Future[Message]:
        name = message.session
        first, stop, reserved = self._service.session_span(name)
        self._moving.add(name)
        opened = self._ask(OpenSession(first, stop, message.adapters, reserved, "foundation"))
        moved = flat_map(opened, lambda answer: self._move(message, _expect(SessionOpened, answer).session, rows_TD))
        moved.add_done_callback(lambda _: self._moving.discard(name))
        return moved

    def _move(self, message: EscalateSession, there: str, rows_TD: Tensor) -> Future[Message]:
        """Send the kept rows to the session that was opened at the cloud. On failure, nothing has changed."""
        sent = self._ask(ExtendSession(there, 0, message.want, rows_TD))
        sent.add_done_callback(lambda done: self._end(there) if done.cancelled() or done.exception() else None)
        return map_result(sent, lambda answer: self._arrived(message.session, there, answer))

    def _arrived(self, name: str, there: str, answer: Message) -> Message:
        rows = _expect(SessionRows, answer)
        if name not in self._moving:  # closed meanwhile
            self._end(there)
            return rows
        self._keep(name, there)
        self._own.handle(CloseSession(name))
        return rows

    # -- the cloud

    def _counted(self, open_there: Callable[[], Future[Message]]) -> Future[Message]:
        """Open a session at the cloud. Raises ``QuotaReached`` if the device has used its part of the edge's quota."""
        with self._lock:
            if self._max_at_cloud is not None:
                self._quota.check_sessions(len(self._there) + self._opening, self._max_at_cloud)
            self._opening += 1
        try:
            opened = open_there()
        except BaseException:
            self._is_open()
            raise
        opened.add_done_callback(lambda _: self._is_open())
        return opened

    def _is_open(self) -> None:
        """Count a session that was opened, or failed to open."""
        with self._lock:
            self._opening -= 1

    def _ask(self, message: Message) -> Future[Message]:
        """Send to the cloud, unless it is away."""
        if not self._cloud.peer:
            return failed(BodyUnreachable(_FM, "the cloud is away"))
        return self._cloud.send(message)

    def _end(self, there: str) -> Future[Message]:
        """Close a session at the cloud, now or when it is back; else it would count against the edge forever."""
        ended = self._cloud.send(CloseSession(there))
        return ended if self._cloud.peer else failed(BodyUnreachable(_FM, "the cloud is away"))


def _on_its_way(name: str) -> SessionRefused:
    return SessionRefused(f"session '{name}'", f"it is on its way to {_FM}", "take that answer first")


def _expect(kind: type[M], answer: Message) -> M:
    return expect(answer, kind, "an edge", " of the cloud")
