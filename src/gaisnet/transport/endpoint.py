"""One end of a link, with its threads: a ``Session`` behind a lock, futures of requests, a worker that answers.

Two threads meet here per connection: one reads (``Connection.read``), one writes (``Connection.frames``). The worker
belongs to all links of a site and lets them run the handler one after the other. No thread waits for anything while
holding the lock.

Waking another thread costs about as much as carrying a small frame. So the reading thread runs the handler itself if it
need not read on meanwhile: no request is being answered at this site, no request of this end is unanswered on this
link, and the other end has acknowledged all replies. If the handler, or any other thread, sends a request over the link
before it is done, another thread takes over the reading. A handler may therefore send requests of its own. Where the
transport allows it (``Connection.send``), the reading thread also sends a short reply.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future

from gaisnet.errors import GaisnetError, LinkLost, MessageTooLarge, PeerError, WireFormatError
from gaisnet.transport.admission import OnceIn
from gaisnet.transport.connection import Connection
from gaisnet.transport.frames import Frame, Kind, decode_frame, encode_failure, encode_frame
from gaisnet.transport.session import Answered, Asked, Event, Failed, Job, Session
from gaisnet.transport.stream import Limits, LinkState
from gaisnet.transport.worker import Worker

ByteHandler = Callable[[str, bytes], bytes | Future[bytes]]
"""(asker's name, payload) -> reply, now or later. Raises ``GaisnetError``; any other error stays here, in the log.

A handler that answers later lets the site answer others meanwhile.
"""

_WARN_EVERY_S = 60.0
_LIVES = 2  # of another site, whose requests may wait here: it can restart while a handler is busy
_SHORT_BYTES = 2**17  # a longer reply takes longer to send than to wake the writer, and the reader can read meanwhile
_log = logging.getLogger(__name__)


class Endpoint:
    """A ``ByteLink`` over any carrier of frames.

    Args:
        other: Name of the other end.
        life: This process's own incarnation, see ``Session``.
        limits: Limits on the other end's messages.
        handle: Answers its requests, in the reading thread or in the worker's.
        worker: Schedules answers.
        dials: See ``Session``.
    """

    def __init__(
        self, other: str, incarnation: bytes, limits: Limits, handle: ByteHandler, worker: Worker, dials: bool
    ) -> None:
        self.other = other
        self.limits = limits
        self._session = Session(incarnation, limits, dials)
        self._ask_bytes = limits.request_bytes(dials)
        self._handle = handle
        self._worker = worker
        self._queued = 0  # requests that wait for the worker, including those of earlier incarnations
        self._lock = threading.Lock()
        self._futures: dict[int, Future[bytes]] = {}
        self._connection: Connection | None = None
        self._closed = False
        self._since = time.monotonic()
        self._last_seen: float | None = None
        self._rejected = 0
        self._problem = ""
        self._warnings, self._failures = OnceIn(_WARN_EVERY_S), OnceIn(_WARN_EVERY_S)

    @property
    def peer(self) -> str:
        """See ``ByteLink.peer``."""
        with self._lock:
            return self._session.peer.hex() if self._session.met else ""

    def send(self, payload: bytes) -> Future[bytes]:
        """See ``ByteLink.send``."""
        if len(payload) > self._ask_bytes:
            raise MessageTooLarge(self.other, len(payload), self._ask_bytes)
        answer = _Answer(self)
        with self._lock:
            if self._closed:
                answer.set_exception(LinkLost(self.other, "the link is closed"))
                return answer
            answer.step = self._session.request(payload)
            self._futures[answer.step] = answer
            self._wake_writer()
            connection = self._connection
        if connection is not None and connection.answers is not None:
            connection.relieve_reader()
        return answer

    def state(self) -> LinkState:
        """Return the state of the link."""
        now = time.monotonic()
        with self._lock:
            return LinkState(
                connected=self._session.met,
                since_s=now - self._since,
                last_seen_s=None if self._last_seen is None else now - self._last_seen,
                incarnation=self._session.peer.hex(),
                rejected_frames=self._rejected,
                problem=self._problem,
            )

    def attach(self) -> Connection:
        """Begin a connection; the previous one ends."""
        connection = Connection(self)
        with self._lock:
            self._detach(self._connection)
            if not self._closed:
                self._connection = connection
                self._session.begin()
        return connection

    def close(self) -> None:
        """Fail all pending requests, and accept no connections or requests any more."""
        with self._lock:
            self._closed = True
            self._detach(self._connection)
            waiting, self._futures = list(self._futures.values()), {}
        for answer in waiting:
            _fail(answer, LinkLost(self.other, "the link was closed"))

    def warn(self, found: str) -> None:
        """Log a problem with the other end, at most once a minute."""
        with self._lock:
            self._problem = found
        if self._warnings.due():
            _log.warning("link to '%s': %s", self.other, found)

    # -- what a connection calls

    def ended(self, connection: Connection) -> None:
        """See ``End.ended``."""
        with self._lock:
            if self._connection is connection:
                self._detach(connection)

    def received(self, connection: Connection, data: bytes) -> bool:
        """Take a frame. Raises ``WireFormatError``.

        Returns:
            Whether the thread that brings it shall read on; otherwise another one already does.
        """
        frame = decode_frame(data, self.limits)
        with self._lock:
            if self._connection is not connection:
                return True
            self._last_seen = time.monotonic()
            if frame.kind is Kind.REQUEST and self._queued >= _LIVES * self.limits.max_requests:
                raise WireFormatError(f"a request where {self._queued} of this site, of earlier lives as well, wait")
            events = self._session.receive(frame)
            if frame.kind in (Kind.HELLO, Kind.WELCOME):
                self._since, self._problem = self._last_seen, ""
            if self._session.has_frames or (self._session.owes and not connection.owes):
                self._wake_writer()
            job = connection.answers = None if connection.ending else self._job_for_reader(events)
        if job is not None:
            return self._answer_here(connection, job)
        for event in events:
            self._carry_out(event)
        return True

    def takes_over(self, connection: Connection) -> bool:
        """See ``End.takes_over``."""
        with self._lock:
            answers, connection.answers = connection.answers, None
        return answers is not None

    def ends(self, connection: Connection) -> bool:
        """See ``End.ends``; an answering thread will not notice soon."""
        with self._lock:
            connection.ending = True
            return connection.answers is not None

    def rejected(self, found: str) -> None:
        """See ``End.rejected``."""
        with self._lock:
            self._rejected += 1
        self.warn(found)

    def next_frame(self, connection: Connection, patient: bool) -> bytes | None:
        """Return the next frame to send; None if there is none. Raises ``EOFError`` at the end of the connection.

        Args:
            connection: The one that sends.
            patient: Do not yet send an acknowledgement alone.
        """
        with self._lock:
            if self._connection is not connection:
                raise EOFError
            if not patient and not connection.idle:  # the reader sends, or a token is on its way
                connection.owes = False
                return None
            connection.idle = False
            frame = self._session.next_frame(patient)
            if frame is None:
                connection.idle = True
                connection.owes = patient and self._session.owes
        return None if frame is None else encode_frame(frame)

    # -- with the lock held

    def _detach(self, connection: Connection | None) -> None:
        if connection is not None:
            self._since = time.monotonic() if self._session.met else self._since
            self._session.end()
            self._connection = None
            connection.tokens.put(None)

    def _wake_writer(self) -> None:
        connection = self._connection
        if connection is not None and connection.idle:
            connection.idle = False
            connection.tokens.put(None)

    def _job_for_reader(self, events: list[Event]) -> Job | None:
        """The request among ``events`` if the thread that reads may answer it. Then it is this link's turn."""
        if not events or self._futures or self._session.held_bytes:
            # An answer that is acknowledged later is read later: it must not count against the answer to come.
            return None
        event = events[0]
        return event.job if isinstance(event, Asked) and self._worker.claim() else None

    def _may_send(self, connection: Connection, answer: bytes) -> bool:
        """The thread that reads ``connection`` may send an answer itself."""
        able = connection is self._connection and connection.send is not None
        return able and connection.idle and len(answer) <= _SHORT_BYTES

    # -- without it

    def _answer_here(self, connection: Connection, job: Job) -> bool:
        """Answer in the thread that reads; whether it shall read on."""
        try:
            frame = self._run(job, connection)
        finally:
            self._worker.release()  # before anything is sent: that may take long
        if frame is not None and connection.send is not None:
            connection.send(encode_frame(frame))
        with self._lock:
            if frame is not None:
                connection.idle = True
                if self._session.has_frames or self._session.owes:
                    self._wake_writer()
            reads_on = connection.answers is job  # a thread that took over may be answering another one
            connection.answers = None if reads_on else connection.answers
        return reads_on

    def _carry_out(self, event: Event) -> None:
        if isinstance(event, Asked):
            with self._lock:
                self._queued += 1
            self._worker.submit(lambda: self._run_queued(event.job), self.other)
        elif isinstance(event, Answered):
            answer = self._futures.pop(event.step, None)
            if answer is not None and answer.set_running_or_notify_cancel():
                answer.set_result(event.payload)
        elif isinstance(event, Failed):
            _fail(self._futures.pop(event.step, None), PeerError(self.other, event.kind, event.text))
        else:
            for step in event.steps:
                _fail(self._futures.pop(step, None), LinkLost(self.other, "it restarted and forgot the request"))

    def abandon(self, step: int) -> bool:
        """Nobody waits for the answer any more; whether somebody did."""
        with self._lock:
            self._session.abandon(step)
            return self._futures.pop(step, None) is not None

    def _run_queued(self, job: Job) -> None:
        with self._lock:
            self._queued -= 1
        self._run(job)

    def _run(self, job: Job, connection: Connection | None = None) -> Frame | None:
        """Answer a request; what its own thread shall send then, if that is the one that reads ``connection``."""
        payload, dropped = job.payload, job.dropped
        if dropped:
            return None
        return self._settle(job, lambda: self._handle(self.other, payload), connection)

    def _settle(
        self, job: Job, work: Callable[[], bytes | Future[bytes]], connection: Connection | None = None
    ) -> Frame | None:
        """Answer with what ``work`` gives, or, where that comes later, then; see ``_run``."""
        outcome = self._outcome(work)
        if isinstance(outcome, Future):
            outcome.add_done_callback(lambda done: self._settle(job, done.result))
            return None
        return self._answer(job, *outcome, connection)

    def _answer(self, job: Job, kind: Kind, answer: bytes, connection: Connection | None = None) -> Frame | None:
        """Let an answer go out; see ``_run``."""
        with self._lock:
            held = self._session.held_bytes
            if held and held + len(answer) > self.limits.max_message_bytes:
                kind, answer = Kind.FAILURE, encode_failure("MessageTooLarge", "answers before it are not acknowledged")
            self._session.answer(job, kind, answer)
            if connection is not None and self._may_send(connection, answer):
                frame = self._session.next_frame(patient=True)
                connection.idle = frame is None
                return frame
            self._wake_writer()
            return None

    def _outcome(self, work: Callable[[], bytes | Future[bytes]]) -> tuple[Kind, bytes] | Future[bytes]:
        try:
            answer = work()
            if isinstance(answer, Future):
                return answer
            if len(answer) > self.limits.max_message_bytes:
                raise MessageTooLarge(self.other, len(answer), self.limits.max_message_bytes)
            return Kind.ANSWER, answer
        except CancelledError:
            return Kind.FAILURE, encode_failure("LinkTimeout", "whoever was to answer gave it up")
        except PeerError as error:  # whoever asks learns what went wrong, not who passed it on
            return Kind.FAILURE, encode_failure(error.kind, error.text)
        except GaisnetError as error:
            return Kind.FAILURE, encode_failure(type(error).__name__, str(error))
        except Exception:
            if self._failures.due():  # the other end can send the same again and again
                _log.exception("a request of '%s' could not be answered; no other is logged for a minute", self.other)
            return Kind.FAILURE, encode_failure("InternalError", "see the log there")


class _Answer(Future[bytes]):
    """Cancelling it gives up the request."""

    step = 0

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__()
        self._endpoint = endpoint

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self._endpoint.abandon(self.step):
            self.set_running_or_notify_cancel()  # now those who wait for several futures know of it too
        return cancelled


def _fail(answer: Future[bytes] | None, error: Exception) -> None:
    if answer is not None and answer.set_running_or_notify_cancel():
        answer.set_exception(error)
