"""Sessions as messages: the end that has the body answers them, the end that writes sends them."""

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
)
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.quota import Quota

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Ask = Callable[[Message], Message | Future[Message]]
"""Sends a message; the answer, now or later, or what the other end raised, or that it cannot be reached."""

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
    """Answers one peer, who cannot touch the sessions of others. The service must have a thread that steps.

    Rows are answered later, so that whoever hands messages in can hand in those of other sessions meanwhile.

    Args:
        service: The body's.
        peer: Its name, by its certificate.
        share: Share of the service's sessions and their memory that the peer may hold.
    """

    def __init__(self, service: BodyService, peer: str, share: float = 1.0) -> None:
        self._service = service
        self._peer = peer
        self._quota = Quota(peer, share)
        self._own: set[str] = set()
        self._closed = False
        self._lock = threading.Lock()

    def handle(self, message: Message) -> Message | Future[Message]:
        """Answer ``message``. Raises ``UnexpectedMessage``, or what the service raises."""
        match message:
            case OpenSession():
                return self._open(message)
            case ExtendSession():
                name = self.own(message.session)
                answer = self._service.extend(name, message.rows_TD, message.want, message.position)
                return map_result(answer, lambda rows_WD: SessionRows(rows_WD.float().cpu()))
            case CropSession():
                self._service.crop(self.own(message.session), message.length)
                return Done()
            case CloseSession():
                if message.session in self._own:
                    self._own.discard(message.session)
                    self._service.close(message.session)
                return Done()
        raise UnexpectedMessage(f"the body service for '{self._peer}'", type(message).__name__)

    def close(self) -> None:
        """The peer is gone: end all its sessions, one that is being opened as well."""
        with self._lock:
            self._closed, own, self._own = True, self._own, set()
        for name in own:
            self._service.close(name)

    def own(self, name: str) -> str:
        """The same name. Raises ``SessionClosed`` if it is not one of the peer's."""
        if name not in self._own:
            raise SessionClosed(name)
        return name

    def _open(self, message: OpenSession) -> SessionOpened:
        asked = message.first, message.stop, message.adapters, message.num_positions
        name = self._service.open(*asked, keep_rows=message.may_escalate, quota=self._quota)
        opened = SessionOpened(name, self._service.versions(name))
        with self._lock:
            if not self._closed:
                self._own.add(name)
                return opened
        self._service.close(name)
        raise SessionClosed(name)


class RemoteSession:
    """A session of a service at the other end; a ``BodySession``. Raises what the service raises, or ``LinkError``.

    Args:
        ask: The other end.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: What acts.
        num_positions: Memory to hold from the beginning.
        body: Which one, where the other end can reach more than its own.
        may_escalate: Whether ``escalate`` may be asked for.
        deadline_s: How long an answer is waited for; ``LinkTimeout`` after that.
    """

    def __init__(
        self,
        ask: Ask,
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
        """What acts on it, each as ``name@version``; before it was escalated."""
        self._length = 0

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions over there."""
        return self._wait(self.send(rows_TD, want), "output rows")

    def send(self, rows_TD: Tensor, want: int) -> Future[Tensor]:
        """The same, without waiting, and without a deadline."""
        length = self._length
        sent = self._sent(ExtendSession(self._open_name(), length, want, rows_TD.cpu()), SessionRows)
        self._length = length + len(rows_TD)
        answer = map_result(sent, lambda rows: _fitting(rows, (want, rows_TD.shape[1])))
        answer.add_done_callback(lambda done: self._fell_back(done, length))
        return answer

    def escalate(self, adapters: Sequence[str], want: int) -> Tensor:
        """Let the FM's body go on, with these adapters; its output at the last ``want`` positions so far [W, D].

        Raises ``BodyUnreachable``, or what that body raises; then the session goes on as it was.
        """
        rows_WD = self._asked(EscalateSession(self._open_name(), tuple(adapters), want), SessionRows).rows_WD
        if len(rows_WD) != want:
            raise WireFormatError(f"{len(rows_WD)} output rows where {want} were asked for")
        return rows_WD

    def crop(self, length: int) -> None:
        """Forget positions from ``length`` on."""
        self._asked(CropSession(self._open_name(), length), Done)
        self._length = length

    def close(self) -> None:
        """End the session over there."""
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
        return map_result(map_error(answer, _as_raised_there), lambda reply: _expected(reply, kind))

    def _wait(self, answer: Future[T], what: str) -> T:
        try:
            return answer.result(self.deadline_s)
        except FutureTimeout:
            answer.cancel()
            raise LinkTimeout(f"a session, waiting for {what}", f"none for {self.deadline_s:.0f} s") from None


def _as_raised_there(error: Exception) -> Exception:
    """What a service refused in another process is refused here, in the same words."""
    if isinstance(error, PeerError) and error.kind in _REFUSALS:
        return _REFUSALS[error.kind].quoted(error.text)
    return error


def _expected(answer: Message, kind: type[M]) -> M:
    if not isinstance(answer, kind):
        raise UnexpectedMessage(f"a session, waiting for a {kind.__name__},", type(answer).__name__)
    return answer


def _fitting(rows: SessionRows, shape: tuple[int, int]) -> Tensor:
    if rows.rows_WD.shape != shape:
        raise WireFormatError(f"output rows {tuple(rows.rows_WD.shape)} where {shape} were asked for")
    return rows.rows_WD
