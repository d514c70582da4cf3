"""What a tier and a service of its body have to do with each other: neither knows the other, both meet here."""

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
from gaisnet.serving.generation.bodies import Place, Target
from gaisnet.transport.base import Handler, Link

_WHOSE: dict[Place, Whose] = {"edge": "domain", "cloud": "foundation"}
_OF_SESSIONS = (OpenSession, ExtendSession, EscalateSession, CropSession, CloseSession)


class BodyPublisher:
    """An ``Publisher`` of a tier: serves its body in a thread, until it is closed or the tier has another body.

    Args:
        settings: Of the service.
        compute_lock: Of the machine that the tier is on.
    """

    def __init__(self, settings: ServiceSettings, compute_lock: ComputeLock) -> None:
        self.compute_lock = compute_lock
        self._settings = settings
        self._opened = ExitStack()
        self._service: BodyService | None = None

    @property
    def service(self) -> BodyService:
        """What serves the present body. Raises ``SessionRefused`` while there is none."""
        if self._service is None:
            raise SessionRefused("a session", "there is no model here yet", "open one when it has come")
        return self._service

    @property
    def serves(self) -> bool:
        """Whether there is a body."""
        return self._service is not None

    def publish_body(self, body: Body, layers: range) -> None:
        """See ``Publisher``; sessions on the body before end."""
        self.close()
        service = BodyService(body, layers, self._settings, self.compute_lock)
        self._opened.enter_context(service.serving())
        self._service = service

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """See ``Publisher``."""
        service = self._service
        if service is not None:
            service.put_adapter(name, version, spec, tensors)

    def close(self) -> None:
        """End all sessions, and the thread."""
        self._service = None
        self._opened.close()


class LinkedBodies:
    """``Bodies`` that are reached over a link to the edge of each domain.

    Args:
        links: By domain.
        deadline_s: How long an answer is waited for.
    """

    def __init__(self, links: Mapping[str, Link], deadline_s: float) -> None:
        self._links = links
        self._deadline_s = deadline_s

    def open(self, target: Target, first: int, stop: int, num_positions: int) -> RemoteSession:
        """See ``Bodies.open``."""
        return self._open(target, first, stop, num_positions, may_escalate=False)

    def open_escalating(self, target: Target, first: int, stop: int, num_positions: int) -> RemoteSession:
        """See ``Bodies.open_escalating``."""
        return self._open(target, first, stop, num_positions, may_escalate=True)

    def _open(self, target: Target, first: int, stop: int, num_positions: int, may_escalate: bool) -> RemoteSession:
        if target.domain not in self._links:
            found = f"there are edges for {', '.join(self._links)}"
            raise SessionRefused(f"a session of domain '{target.domain}'", found, "name one of those")
        asked = first, stop, target.adapters, num_positions, _WHOSE[target.body], may_escalate
        return RemoteSession(self._links[target.domain].send, *asked, deadline_s=self._deadline_s)


class Sessions(Protocol):
    """Answers what one peer asks of its sessions."""

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``."""

    def close(self) -> None:
        """The peer is gone: end all its sessions."""


class PeerRouter:
    """What one peer meets: messages of sessions go to the body's service, all others to the tier.

    The sessions of a peer end when it restarts, when it has been away for too long, and when the tier has another body.

    Args:
        tier: Behind; None where the peer has nothing else to ask.
        publisher: Of the tier's body.
        new_sessions: Answers the peer on a service.
        peer: For errors.
        life: Names the peer's present life; '' while it is away. None for one that is always there.
    """

    def __init__(
        self,
        tier: Handler | None,
        publisher: BodyPublisher,
        new_sessions: Callable[[BodyService], Sessions],
        peer: str,
        incarnation: Callable[[], str] | None = None,
    ) -> None:
        self._tier = tier
        self._publisher = publisher
        self._new_sessions = new_sessions
        self._peer = peer
        self._incarnation = incarnation or (lambda: "here")
        self._lock = threading.Lock()
        self._sessions: Sessions | None = None
        self._of: tuple[BodyService, str] | None = None  # the service and the peer's life that they belong to
        self._seen = time.monotonic()

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or what the service or the tier raises."""
        if isinstance(message, _OF_SESSIONS):
            return self._present().handle(message)
        if self._tier is None:
            raise UnexpectedMessage(f"the body service for '{self._peer}'", type(message).__name__)
        return self._tier.handle(message)

    def look(self, away_s: float) -> None:
        """End the sessions of a peer that has another life, or has been away for ``away_s``; call it now and then."""
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

    def _present(self) -> Sessions:
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
