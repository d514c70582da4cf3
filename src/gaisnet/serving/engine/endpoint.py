"""Sessions over a link: one end has the body and answers messages, the other one sends them."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

from torch import Tensor

from gaisnet.errors import (
    AdapterMismatch,
    BodyUnreachable,
    ContextFull,
    CutError,
    GaisnetError,
    LinkTimeout,
    PeerError,
    QuotaReached,
    ServiceFull,
    SessionClosed,
    SessionRefused,
    UnexpectedMessage,
    UnknownAdapter,
    WireFormatError,
)
from gaisnet.futures import as_future, failed, map_error, map_result
from gaisnet.messages import (
    CloseSession,
    CropSession,
    Done,
    EscalateSession,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
    Whose,
    expect,
)
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.scheduler import Quota

M = TypeVar("M", bound=Message)
T = TypeVar("T")
SendRequest = Callable[[Message], Message | Future[Message]]
"""Sends a message; the future gets the reply, or an error from the other end or from the link."""

_REFUSALS: dict[str, type[GaisnetError]] = {
    kind.__name__: kind
    for kind in (
        AdapterMismatch,
        BodyUnreachable,
        ContextFull,
        CutError,
        QuotaReached,
        ServiceFull,
        SessionClosed,
        SessionRefused,
        UnknownAdapter,
        WireFormatError,
    )
}


class SessionEndpoint:
    """Answers one peer, which cannot touch sessions of others. The service needs a thread that runs steps.

    Replies with rows come by futures, so that a caller can pass on messages of other sessions meanwhile.

    Args:
        service: The body's service.
        peer: The peer's name, from its certificate.
        share: Share of the service's sessions and memory that the peer may use.
    """

    def __init__(self, service: BodyService, peer: str, share: float = 1.0) -> None:
        self._service = service
        self._peer = peer
        self._quota = Quota(peer, share)
        self._own: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or the service's error."""
        match message:
            case OpenSession():
                return self._open(message)
            case ExtendSession():
                name = self.own(message.session)
                answer = self._service.extend_session(name, message.rows_TD, message.want, message.position)
                return map_result(answer, lambda rows_WD: SessionRows(rows_WD.float().cpu()))
            case CropSession():
                self._service.crop_session(self.own(message.session), message.length)
                return Done()
            case CloseSession():
                if message.session in self._own:
                    self._own.discard(message.session)
                    self._service.close_session(message.session)
                return Done()
        raise UnexpectedMessage(f"the body service for '{self._peer}'", type(message).__name__)

    def close(self) -> None:
        """Close all sessions of a peer that is gone, including one being opened."""
        with self._lock:
            self._closed, own, self._own = True, self._own, set()
        for name in own:
            self._service.close_session(name)

    def own(self, name: str) -> str:
        """Return the name. Raises ``SessionClosed`` if it is not one of the peer's sessions."""
        if name not in self._own:
            raise SessionClosed(name)
        return name

    def _open(self, message: OpenSession) -> SessionOpened:
        asked = message.first, message.stop, message.adapters, message.num_positions
        name = self._service.open_session(*asked, keep_rows=message.may_escalate, quota=self._quota)
        opened = SessionOpened(name, self._service.adapter_versions(name))
        with self._lock:
            if not self._closed:
                self._own.add(name)
                return opened
        self._service.close_session(name)
        raise SessionClosed(name)


class RemoteSession:
    """A ``BodySession`` of a service at the other end. Raises the service's errors, or ``LinkError``.

    Args:
        ask: Sends to the other end.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: Adapters to activate.
        num_positions: Positions to reserve memory for.
        body: The body, where the other end can reach more than its own.
        may_escalate: Whether ``escalate`` may be called.
        deadline_s: Seconds to wait for a reply; then ``LinkTimeout``.
    """

    def __init__(
        self,
        ask: SendRequest,
        first: int,
        stop: int,
        adapters: Sequence[str] = (),
        num_positions: int = 0,
        body: Whose = "domain",
        may_escalate: bool = False,
        deadline_s: float = 60.0,
    ) -> None:
        self._ask = ask
        self.deadline_s = deadline_s
        message = OpenSession(first, stop, tuple(adapters), num_positions, body, may_escalate)
        opened = self._asked(message, SessionOpened)
        self._name: str | None = opened.session
        self.versions = opened.adapters
        """Active adapters, each as ``name@version``; before escalation."""
        self._length = 0

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions at the other end."""
        return self._wait(self.send(rows_TD, want), "output rows")

    def send(self, rows_TD: Tensor, want: int) -> Future[Tensor]:
        """Run new positions without waiting, and without a deadline."""
        length = self._length
        sent = self._sent(ExtendSession(self._open_name(), length, want, rows_TD.cpu()), SessionRows)
        self._length = length + len(rows_TD)
        answer = map_result(sent, lambda rows: _fitting(rows, (want, rows_TD.shape[1])))
        answer.add_done_callback(lambda done: self._fell_back(done, length))
        return answer

    def escalate(self, adapters: Sequence[str], want: int) -> Tensor:
        """Continue on the FM's body with these adapters; return its last ``want`` output rows so far [W, D].

        Raises ``BodyUnreachable``, or the body's error; then the session goes on as before.
        """
        rows_WD = self._asked(EscalateSession(self._open_name(), tuple(adapters), want), SessionRows).rows_WD
        if len(rows_WD) != want:
            raise WireFormatError(f"{len(rows_WD)} output rows where {want} were asked for")
        return rows_WD

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""
        self._asked(CropSession(self._open_name(), length), Done)
        self._length = length

    def close(self) -> None:
        """Close the session at the other end."""
        if self._name is not None:
            name, self._name = self._name, None
            self._asked(CloseSession(name), Done)

    def _fell_back(self, done: Future[Tensor], length: int) -> None:
        if done.cancelled() or done.exception() is not None:
            self._length = min(self._length, length)

    def _open_name(self) -> str:
        if self._name is None:
            raise SessionClosed("of an answer that has ended")
        return self._name

    def _asked(self, message: Message, kind: type[M]) -> M:
        return self._wait(self._sent(message, kind), f"a {kind.__name__}")

    def _sent(self, message: Message, kind: type[M]) -> Future[M]:
        try:
            answer = as_future(self._ask(message))
        except Exception as error:
            answer = failed(error)
        return map_result(map_error(answer, _as_raised_there), lambda reply: expect(reply, kind, "a session"))

    def _wait(self, answer: Future[T], what: str) -> T:
        try:
            return answer.result(self.deadline_s)
        except FutureTimeout:
            answer.cancel()
            raise LinkTimeout(f"a session, waiting for {what}", f"none for {self.deadline_s:.0f} s") from None


def _as_raised_there(error: Exception) -> Exception:
    """Convert a refusal from another process to the same error here, with the same words."""
    if isinstance(error, PeerError) and error.kind in _REFUSALS:
        return _REFUSALS[error.kind].quoted(error.text)
    return error


def _fitting(rows: SessionRows, shape: tuple[int, int]) -> Tensor:
    if rows.rows_WD.shape != shape:
        raise WireFormatError(f"output rows {tuple(rows.rows_WD.shape)} where {shape} were asked for")
    return rows.rows_WD
