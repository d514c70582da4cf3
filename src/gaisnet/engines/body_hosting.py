"""Glue between a tier and the service that hosts its body; neither imports the other."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Protocol

from torch import Tensor

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import ComputeLock
from gaisnet.config import ServiceSettings
from gaisnet.errors import SessionRefused, UnexpectedMessage
from gaisnet.messages import CloseSession, CropSession, EscalateSession, ExtendSession, Message, OpenSession, Whose
from gaisnet.models.parts import Body
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.endpoint import RemoteSession
from gaisnet.serving.generation.routing import Place, Target
from gaisnet.transport.base import Handler, Link

_WHOSE: dict[Place, Whose] = {"edge": "domain", "cloud": "foundation"}
_OF_SESSIONS = (OpenSession, ExtendSession, EscalateSession, CropSession, CloseSession)


class BodyPublisher:
    """A tier's ``Publisher`` that serves its body in a thread, until it is closed or the tier has another body.

    Args:
        settings: Settings of the service.
        compute_lock: The lock of the tier's machine.
    """

    def __init__(self, settings: ServiceSettings, compute_lock: ComputeLock) -> None:
        self.compute_lock = compute_lock
        self._settings = settings
        self._opened = ExitStack()
        self._service: BodyService | None = None

    @property
    def service(self) -> BodyService:
        """The service of the present body. Raises ``SessionRefused`` while there is none."""
        if self._service is None:
            raise SessionRefused("a session", "there is no model here yet", "open one when it has come")
        return self._service

    @property
    def serves(self) -> bool:
        """Whether there is a body."""
        return self._service is not None

    def publish_body(self, body: Body, layers: range) -> None:
        """Serve a body; sessions on the previous one end."""
        self.close()
        service = BodyService(body, layers, self._settings, self.compute_lock)
        self._opened.enter_context(service.serving())
        self._service = service

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """See ``Publisher``."""
        service = self._service
        if service is not None:
            service.install_adapter(name, version, spec, tensors)

    def close(self) -> None:
        """End all sessions, and the thread."""
        self._service = None
        self._opened.close()


class LinkedBodies:
    """``Bodies`` behind a link to the edge of each domain.

    Args:
        links: Links by domain.
        deadline_s: Seconds to wait for a reply.
    """

    def __init__(self, links: Mapping[str, Link], deadline_s: float) -> None:
        self._links = links
        self._deadline_s = deadline_s

    def open_session(self, target: Target, first: int, stop: int, num_positions: int) -> RemoteSession:
        """See ``Bodies.open_session``."""
        return self._open(target, first, stop, num_positions, may_escalate=False)

    def open_escalating_session(self, target: Target, first: int, stop: int, num_positions: int) -> RemoteSession:
        """See ``Bodies.open_escalating_session``."""
        return self._open(target, first, stop, num_positions, may_escalate=True)

    def _open(self, target: Target, first: int, stop: int, num_positions: int, may_escalate: bool) -> RemoteSession:
        if target.domain not in self._links:
            found = f"there are edges for {', '.join(self._links)}"
            raise SessionRefused(f"a session of domain '{target.domain}'", found, "name one of those")
        asked = first, stop, target.adapters, num_positions, _WHOSE[target.body], may_escalate
        return RemoteSession(self._links[target.domain].send, *asked, deadline_s=self._deadline_s)


class SessionHandler(Protocol):
    """Answers one peer's requests about its sessions."""

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``."""

    def close(self) -> None:
        """End all sessions of a peer that is gone."""


class PeerRouter:
    """Routes one peer's messages: those of sessions to the body's service, all others to the tier.

    The sessions of a peer end when it restarts, when it has been away for too long, and when the tier has another body.

    Args:
        tier: The tier; None if the peer has nothing else to ask.
        publisher: The publisher of the tier's body.
        new_sessions: Makes the peer's endpoint on a service.
        peer: Name of the peer, for errors.
        incarnation: Returns the peer's incarnation; '' while it is away. None for one that is always there.
    """

    def __init__(
        self,
        tier: Handler | None,
        publisher: BodyPublisher,
        new_sessions: Callable[[BodyService], SessionHandler],
        peer: str,
        incarnation: Callable[[], str] | None = None,
    ) -> None:
        self._tier = tier
        self._publisher = publisher
        self._new_sessions = new_sessions
        self._peer = peer
        self._incarnation = incarnation or (lambda: "here")
        self._lock = threading.Lock()
        self._sessions: SessionHandler | None = None
        self._of: tuple[BodyService, str] | None = None  # the service and the peer's incarnation that they belong to
        self._seen = time.monotonic()

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or an error of the service or the tier."""
        if isinstance(message, _OF_SESSIONS):
            return self._present().handle(message)
        if self._tier is None:
            raise UnexpectedMessage(f"the body service for '{self._peer}'", type(message).__name__)
        return self._tier.handle(message)

    def end_stale_sessions(self, away_s: float) -> None:
        """End the sessions of a peer that restarted, or has been away for ``away_s``; to be called now and then."""
        now, incarnation = time.monotonic(), self._incarnation()
        with self._lock:
            self._seen = now if incarnation else self._seen
            restarted = bool(incarnation) and self._of is not None and self._of[1] != incarnation
            if restarted or now - self._seen > away_s:
                self._end()

    def close(self) -> None:
        """End all sessions."""
        with self._lock:
            self._end()

    def _present(self) -> SessionHandler:
        service, incarnation = self._publisher.service, self._incarnation()
        with self._lock:
            if incarnation and self._of is not None and self._of != (service, incarnation):
                self._end()
            if self._sessions is None:
                self._sessions, self._of = self._new_sessions(service), (service, incarnation)
            return self._sessions

    def _end(self) -> None:
        sessions, self._sessions, self._of = self._sessions, None, None
        if sessions is not None:
            sessions.close()
