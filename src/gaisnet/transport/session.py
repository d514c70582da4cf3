"""Session protocol: the state of one end of a link, and the rules of the conversation. It does no input or output.

A ``Session`` outlives connections. Within one connection each end numbers its requests upward, sends the parts of a
payload with nothing between, and answers a request at most once, after it arrived on that same connection. When a
connection begins, each end repeats its unanswered requests in order. The answering end keeps a job until
its reply is acknowledged, so a repeated request is not executed again. Any violation raises
``WireFormatError``, and the connection must then end.

An asking end holds back: at most ``limits.max_requests`` unanswered requests, and ``limits.request_bytes`` in all
of them, are sent. So the other end can refuse more than that before it has stored any of it.
"""

from collections import deque
from dataclasses import dataclass, field
from io import BytesIO
from typing import NamedTuple

from gaisnet.errors import WireFormatError
from gaisnet.transport.frames import Frame, Kind, decode_failure
from gaisnet.transport.stream import Limits

# Less than this in answers is acknowledged by the next frame that goes that way anyway: a frame of its own costs as
# much time as a small request.
_OWED_BYTES = 2**18


@dataclass(eq=False, slots=True)
class Job:
    """A request of the other end, from its completion until its reply is acknowledged."""

    step: int
    payload: bytes
    size: int
    asked: bool = True  # on the present connection
    dropped: bool = False  # the reply has been given up
    answer: tuple[Kind, bytes] | None = None

    def drop(self) -> None:
        """Forget it; it may still be queued somewhere."""
        self.dropped = True
        self.payload = b""


class Asked(NamedTuple):
    """A complete request: run the job, then call ``Session.answer``."""

    job: Job


class Answered(NamedTuple):
    """The reply to a request."""

    step: int
    payload: bytes


class Failed(NamedTuple):
    """The other end could not answer a request."""

    step: int
    kind: str
    text: str


class Lost(NamedTuple):
    """The other end restarted; these requests will not be answered."""

    steps: tuple[int, ...]


Event = Asked | Answered | Failed | Lost


class _Incoming:
    """A payload whose parts are arriving. It holds only received parts."""

    def __init__(self, first: Frame) -> None:
        self._first = first
        self._next_part = 0
        self._received = BytesIO()
        self.size = 0

    def add_part(self, frame: Frame) -> bytes | None:
        """Add the next part; return the payload when it is complete."""
        first = self._first
        if (frame.kind, frame.step, frame.total_bytes) != (first.kind, first.step, first.total_bytes):
            raise WireFormatError(
                f"a {frame.kind.name} for step {frame.step} between the parts of a {first.kind.name} for {first.step}"
            )
        if frame.part != self._next_part:
            raise WireFormatError(f"part {frame.part} of step {frame.step} where part {self._next_part} is due")
        if self.size + len(frame.payload) > frame.total_bytes:
            raise WireFormatError(f"parts of more than {frame.total_bytes} bytes for step {frame.step}")
        self._next_part += 1
        self.size += len(frame.payload)
        self._received.write(frame.payload)
        # CPython hands over the buffer itself, without a copy.
        return self._received.getvalue() if self.size == frame.total_bytes else None


@dataclass(slots=True)
class _Outgoing:
    """A payload whose parts are going out."""

    kind: Kind
    step: int
    payload: bytes
    job: Job | None = None
    part: int = 0
    sent: int = 0


@dataclass(slots=True)
class _Talk:
    """State of one connection."""

    greeted: bool = False  # this end has identified itself
    met: bool = False  # the other end has
    to_ask: deque[int] = field(default_factory=deque)
    to_answer: deque[Job] = field(default_factory=deque)
    outgoing: _Outgoing | None = None
    incoming: _Incoming | None = None
    awaiting: dict[int, int] = field(
        default_factory=dict
    )  # size by step: asked and unanswered, including abandoned ones
    newest: int = 0  # highest step that the other end has asked
    heard: int = 0  # received replies
    owed: int = 0  # bytes of received replies that are not acknowledged yet
    answered: deque[Job] = field(default_factory=deque)  # sent, not acknowledged
    acknowledged: int = 0


class Session:
    """One end's side of the conversation with one other site. Not thread-safe.

    Args:
        life: 16 random bytes, this process's incarnation.
        limits: Limits on the other end's messages.
        dials: Whether this end opens the connections. The dialed end loses its requests when the other one restarts;
            the dialing end repeats them.
    """

    def __init__(self, incarnation: bytes, limits: Limits, dials: bool) -> None:
        self.peer = b""
        """Incarnation of the other end; the last one while there is no connection, empty before the first."""
        self._incarnation = incarnation
        self._limits = limits
        self._dials = dials
        self._ask_bytes, self._take_bytes = limits.request_bytes(dials), limits.request_bytes(not dials)
        self._last_step = 0
        self._requests: dict[int, bytes] = {}  # unanswered, by step, upward
        self._jobs: dict[int, Job] = {}  # by step
        self._carried = False  # there may be jobs of an earlier connection
        self._highest = 0  # last step of the other end's present incarnation that became a job
        self._talk: _Talk | None = None

    @property
    def met(self) -> bool:
        """Whether there is a connection on which the other end has identified itself."""
        return self._talk is not None and self._talk.met

    @property
    def buffered_bytes(self) -> int:
        """Bytes of the other end's payloads held here: parts, and unanswered jobs."""
        incoming = self._talk.incoming if self._talk else None
        return (incoming.size if incoming else 0) + sum(len(job.payload) for job in self._jobs.values())

    @property
    def held_bytes(self) -> int:
        """Bytes of replies that the other end has not acknowledged."""
        return sum(len(job.answer[1]) for job in self._jobs.values() if job.answer)

    def begin(self) -> None:
        """Begin a new connection; the previous one has ended."""
        self._talk = _Talk()
        for job in self._jobs.values():
            job.asked = False
        self._carried = bool(self._jobs)

    def end(self) -> None:
        """End the connection."""
        self._talk = None

    def request(self, payload: bytes) -> int:
        """Send a request; return its step."""
        self._last_step += 1
        self._requests[self._last_step] = payload
        if self._talk and self._talk.met:
            self._talk.to_ask.append(self._last_step)
        return self._last_step

    def abandon(self, step: int) -> None:
        """Abandon a request: it is not sent (again), and a late reply is dropped."""
        self._requests.pop(step, None)

    def answer(self, job: Job, kind: Kind, payload: bytes) -> None:
        """Set the result of a job: ``ANSWER`` or ``FAILURE``."""
        if job.dropped:
            return
        job.answer = (kind, payload)
        job.payload = b""
        if self._talk and job.asked:
            self._talk.to_answer.append(job)

    # -- frames that go out

    @property
    def owes(self) -> bool:
        """Whether an ``ACK`` is due; waiting a moment may let another frame carry it."""
        return self._talk is not None and self._talk.owed >= _OWED_BYTES

    @property
    def has_frames(self) -> bool:
        """Whether ``next_frame`` would return something else than an ``ACK``."""
        talk = self._talk
        if talk is None:
            return False
        if not talk.greeted:
            return self._dials or talk.met
        return talk.met and bool(talk.outgoing or talk.to_answer or (talk.to_ask and self._may_ask(talk)))

    def next_frame(self, patient: bool = False) -> Frame | None:
        """Return the next frame to send, if any, but no ``ACK`` if ``patient``.

        Payloads are cut here, one part per call.
        """
        talk = self._talk
        if talk is None:
            return None
        if not talk.greeted:
            talk.greeted = self._dials or talk.met
            return Frame(self._incarnation, Kind.HELLO if self._dials else Kind.WELCOME) if talk.greeted else None
        out = talk.outgoing
        if out is None and (talk.to_answer or talk.to_ask) and talk.met:
            out = talk.outgoing = self._next_outgoing(talk)
        if out:
            return self._next_part(talk, out)
        return self._acknowledgement(talk) if talk.owed >= _OWED_BYTES and not patient else None

    def _acknowledgement(self, talk: _Talk) -> Frame:
        talk.owed = 0
        return Frame(self._incarnation, Kind.ACK, acknowledged=talk.heard)

    def _may_ask(self, talk: _Talk) -> bool:
        """Return whether a request waits to be sent, and the other end has room for it."""
        while talk.to_ask and talk.to_ask[0] not in self._requests:
            talk.to_ask.popleft()
        if not talk.to_ask or not talk.awaiting:
            return bool(talk.to_ask)  # a single one is within the limit
        held = sum(talk.awaiting.values()) + len(self._requests[talk.to_ask[0]])
        return len(talk.awaiting) < self._limits.max_requests and held <= self._ask_bytes

    def _next_outgoing(self, talk: _Talk) -> _Outgoing | None:
        while talk.to_answer:
            job = talk.to_answer.popleft()
            if job.answer and not job.dropped:
                return _Outgoing(job.answer[0], job.step, job.answer[1], job)
        if talk.to_ask and self._may_ask(talk):
            step = talk.to_ask.popleft()
            return _Outgoing(Kind.REQUEST, step, self._requests[step])
        return None

    def _next_part(self, talk: _Talk, out: _Outgoing) -> Frame:
        talk.owed = 0
        total = len(out.payload)
        stop = min(out.sent + self._limits.part_bytes, total)
        piece = out.payload if total == stop - out.sent else memoryview(out.payload)[out.sent : stop]
        frame = Frame(self._incarnation, out.kind, out.step, out.part, total, talk.heard, piece)
        out.part, out.sent = out.part + 1, stop
        if stop == total:
            talk.outgoing = None
            if out.job:
                talk.answered.append(out.job)
            else:
                talk.awaiting[out.step] = total
        return frame

    # -- frames that come in

    def receive(self, frame: Frame) -> list[Event]:
        """Process a frame; return its event. Raises ``WireFormatError`` if it is not allowed now."""
        talk = self._talk
        if talk is None:
            return []
        if frame.kind in (Kind.HELLO, Kind.WELCOME):
            return self._meet(talk, frame)
        if not talk.met:
            raise WireFormatError(f"a {frame.kind.name} from an end that has not said who it is")
        if frame.session != self.peer:
            raise WireFormatError(f"a {frame.kind.name} of another session")
        if frame.acknowledged != talk.acknowledged:
            self._acknowledge(talk, frame.acknowledged)
        if frame.kind is Kind.ACK and talk.incoming is None:
            return []
        payload = self._collect(talk, frame)
        if payload is None:
            return []
        return (
            self._asked(talk, frame.step, payload) if frame.kind is Kind.REQUEST else self._heard(talk, frame, payload)
        )

    def _meet(self, talk: _Talk, frame: Frame) -> list[Event]:
        due = Kind.WELCOME if self._dials else Kind.HELLO
        if frame.kind is not due or talk.met or talk.greeted is not self._dials or frame.acknowledged:
            raise WireFormatError(f"a {frame.kind.name} that was not due")
        talk.met = True
        lost: tuple[int, ...] = ()
        if frame.session != self.peer:
            if self.peer and not self._dials:
                lost = tuple(self._requests)
                self._requests.clear()
            self._forget_jobs()
            self.peer = frame.session
        talk.to_ask.extend(self._requests)
        return [Lost(lost)] if lost else []

    def _forget_jobs(self) -> None:
        for job in self._jobs.values():
            job.drop()
        self._jobs.clear()
        self._highest = 0

    def _acknowledge(self, talk: _Talk, count: int) -> None:
        if not 0 <= count - talk.acknowledged <= len(talk.answered):
            raise WireFormatError(f"{count} answers acknowledged where {talk.acknowledged} were before")
        while talk.acknowledged < count:
            talk.acknowledged += 1
            job = talk.answered.popleft()
            job.drop()
            self._jobs.pop(job.step, None)

    def _collect(self, talk: _Talk, frame: Frame) -> bytes | None:
        """Return the payload if this frame completes it."""
        if talk.incoming is None:
            self._admit(talk, frame)
            if isinstance(frame.payload, bytes) and frame.part == 0 and len(frame.payload) == frame.total_bytes:
                return frame.payload
            talk.incoming = _Incoming(frame)
        payload = talk.incoming.add_part(frame)
        if payload is not None:
            talk.incoming = None
        return payload

    def _admit(self, talk: _Talk, frame: Frame) -> None:
        """Raise if a payload may not begin now, before any of it is stored."""
        if frame.kind is not Kind.REQUEST:
            if frame.step not in talk.awaiting:
                raise WireFormatError(f"a {frame.kind.name} to step {frame.step}, which does not wait for one")
            return
        if frame.step <= talk.newest or (frame.step <= self._highest and frame.step not in self._jobs):
            raise WireFormatError(f"a REQUEST for step {frame.step} again")
        if frame.total_bytes > self._take_bytes:
            raise WireFormatError(f"a request of {frame.total_bytes} bytes, the limit is {self._take_bytes}")
        if not self._jobs:
            return
        waiting = [job.size for job in self._jobs.values() if job.asked]
        if not waiting:
            return
        if len(waiting) >= self._limits.max_requests:
            raise WireFormatError(f"more than {self._limits.max_requests} requests at once")
        if sum(waiting) + frame.total_bytes > self._take_bytes:
            raise WireFormatError(f"requests of more than {self._take_bytes} bytes at once")

    def _asked(self, talk: _Talk, step: int, payload: bytes) -> list[Event]:
        talk.newest = step
        if self._carried:
            self._drop_left_out(step)
        known = self._jobs.get(step)
        if known is None:
            self._highest = step
            self._jobs[step] = job = Job(step, payload, len(payload))
            return [Asked(job)]
        known.asked = True
        if known.answer:
            talk.to_answer.append(known)
        return []

    def _drop_left_out(self, step: int) -> None:
        """Drop requests before ``step``: retries arrive in order, so a gap means that the other end gave them up."""
        for job in [job for job in self._jobs.values() if job.step < step and not job.asked]:
            job.drop()
            del self._jobs[job.step]

    def _heard(self, talk: _Talk, frame: Frame, payload: bytes) -> list[Event]:
        failure = decode_failure(payload) if frame.kind is Kind.FAILURE else None
        del talk.awaiting[frame.step]
        talk.heard += 1
        talk.owed += len(payload)
        if self._requests.pop(frame.step, None) is None:
            return []
        return [Failed(frame.step, *failure) if failure else Answered(frame.step, payload)]
