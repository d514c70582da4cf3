"""The rules of a conversation, without a network: two sessions, and frames that are carried between them by hand."""

import random
from collections.abc import Iterator

import pytest

from gaisnet.errors import WireFormatError
from gaisnet.transport.frames import Frame, Kind, decode_frame, encode_failure, encode_frame
from gaisnet.transport.session import Answered, Asked, Event, Failed, Job, Lost, Session
from gaisnet.transport.stream import Limits

LIMITS = Limits(part_bytes=10, max_message_bytes=100, max_requests=3)
DEVICE, EDGE = b"d" * 16, b"e" * 16


def frames(session: Session) -> Iterator[Frame]:
    """Everything that it wants to send, as it would look after crossing."""
    while (frame := session.next_frame()) is not None:
        yield decode_frame(encode_frame(frame), LIMITS)


def carry(sender: Session, receiver: Session, at_most: int = 10_000) -> list[Event]:
    events: list[Event] = []
    for _ in range(at_most):
        if (frame := sender.next_frame()) is None:
            break
        events += receiver.receive(decode_frame(encode_frame(frame), LIMITS))
    return events


class Pair:
    """A dialer and a listener with a connection between them."""

    def __init__(self) -> None:
        self.device = Session(DEVICE, LIMITS, dials=True)
        self.edge = Session(EDGE, LIMITS, dials=False)
        self.connect()

    def connect(self) -> list[Event]:
        self.device.begin()
        self.edge.begin()
        return [event for event in self.settle() if isinstance(event, Lost)]

    def settle(self) -> list[Event]:
        """Carry until nobody has anything to send; what happened."""
        events: list[Event] = []
        while self.device.has_frames or self.edge.has_frames:
            events += carry(self.device, self.edge) + carry(self.edge, self.device)
        return events

    def drop(self) -> None:
        self.device.end()
        self.edge.end()


def jobs(events: list[Event]) -> list[Job]:
    return [event.job for event in events if isinstance(event, Asked)]


def only_job(events: list[Event]) -> Job:
    (job,) = jobs(events)
    return job


# -- asking and answering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 99, 100])
@pytest.mark.parametrize("asker", ["device", "edge"])
def test_a_request_is_answered(size: int, asker: str) -> None:
    pair = Pair()
    here, there = (pair.device, pair.edge) if asker == "device" else (pair.edge, pair.device)
    payload = bytes(range(size))
    step = here.request(payload)
    job = only_job(carry(here, there))
    assert job.payload == payload
    there.answer(job, Kind.ANSWER, payload[::-1])
    assert carry(there, here) == [Answered(step, payload[::-1])]
    assert there.buffered_bytes == here.buffered_bytes == 0


def test_a_failure_names_what_was_raised() -> None:
    pair = Pair()
    step = pair.device.request(b"?")
    pair.edge.answer(only_job(carry(pair.device, pair.edge)), Kind.FAILURE, encode_failure("CutError", "no \udc80 é"))
    assert carry(pair.edge, pair.device) == [Failed(step, "CutError", "no ? é")]


def test_answers_may_come_in_another_order() -> None:
    pair = Pair()
    first, second = pair.device.request(b"1"), pair.device.request(b"2")
    early, late = jobs(carry(pair.device, pair.edge))
    pair.edge.answer(late, Kind.ANSWER, b"b")
    pair.edge.answer(early, Kind.ANSWER, b"a")
    assert carry(pair.edge, pair.device) == [Answered(second, b"b"), Answered(first, b"a")]


def test_an_end_that_asks_holds_back_what_the_other_would_refuse() -> None:
    pair = Pair()
    for size in (30, 30, 30, 30):
        pair.device.request(bytes(size))
    first, *others = jobs(pair.settle())
    assert len(others) == 2  # three at once
    pair.edge.answer(first, Kind.ANSWER, b"")
    assert len(jobs(pair.settle())) == 1


def test_an_end_that_asks_holds_back_bytes_too() -> None:
    pair = Pair()
    for size in (60, 60, 1):
        pair.device.request(bytes(size))
    job = only_job(pair.settle())
    pair.edge.answer(job, Kind.ANSWER, b"")
    assert len(jobs(pair.settle())) == 2


def test_who_dials_may_be_given_less_to_ask_with_than_to_answer_with() -> None:
    limits = Limits(part_bytes=10, max_message_bytes=100, max_dialer_bytes=20, max_requests=3)
    device, edge = Session(DEVICE, limits, dials=True), Session(EDGE, limits, dials=False)
    device.begin()
    edge.begin()
    carry(device, edge)
    carry(edge, device)
    for size in (15, 15):
        device.request(bytes(size))
    (first,) = jobs(carry(device, edge))  # the other one would be refused, so it waits
    edge.request(bytes(100))
    edge.answer(first, Kind.ANSWER, b"")
    device.answer(only_job(carry(edge, device)), Kind.ANSWER, bytes(100))
    assert len(jobs(carry(device, edge))) == 1
    for size in (6, 21):  # beside the one of 15 that waits, and for itself
        with pytest.raises(WireFormatError, match="request"):
            edge.receive(Frame(DEVICE, Kind.REQUEST, 9, 0, size, 1, b"x"))
    assert edge.buffered_bytes == 15


def test_large_answers_are_acknowledged_at_once_and_small_ones_by_the_next_frame() -> None:
    limits = Limits()
    device, edge = Session(DEVICE, limits, dials=True), Session(EDGE, limits, dials=False)
    device.begin()
    edge.begin()
    for sender, receiver in ((device, edge), (edge, device)):
        carry(sender, receiver)
    for size, owes in ((10, False), (2**18, True)):
        device.request(b"?")
        edge.answer(only_job(carry(device, edge)), Kind.ANSWER, bytes(size))
        while (frame := edge.next_frame()) is not None:
            device.receive(frame)
        assert device.owes is owes and not device.has_frames
    ack = device.next_frame()
    assert ack is not None and (ack.kind, ack.acknowledged) == (Kind.ACK, 2)
    assert device.next_frame() is None and not device.owes
    assert edge.receive(ack) == []


# -- drops -------------------------------------------------------------------------------------------------------------


def test_a_request_made_before_the_first_connection_waits() -> None:
    device, edge = Session(DEVICE, LIMITS, dials=True), Session(EDGE, LIMITS, dials=False)
    step = edge.request(b"early")
    assert edge.next_frame() is None and not edge.has_frames
    device.begin()
    edge.begin()
    assert carry(device, edge) == []
    job = only_job(carry(edge, device))
    device.answer(job, Kind.ANSWER, b"yes")
    assert carry(device, edge) == [Answered(step, b"yes")]


@pytest.mark.parametrize("parts_before", range(6))
def test_a_request_that_was_cut_off_is_run_once(parts_before: int) -> None:
    pair = Pair()
    step = pair.device.request(bytes(50))
    before = jobs(carry(pair.device, pair.edge, parts_before))
    pair.drop()
    assert pair.edge.buffered_bytes == (50 if before else 0)
    pair.device.begin()
    pair.edge.begin()
    job = only_job([Asked(job) for job in before] + pair.settle())
    pair.edge.answer(job, Kind.ANSWER, b"once")
    assert pair.settle() == [Answered(step, b"once")]


@pytest.mark.parametrize("answered_before", [True, False])
@pytest.mark.parametrize("parts_before", range(4))
def test_an_answer_that_was_cut_off_is_kept(parts_before: int, answered_before: bool) -> None:
    pair = Pair()
    step = pair.edge.request(b"?")
    job = only_job(pair.settle())
    if answered_before:
        pair.device.answer(job, Kind.ANSWER, bytes(30))
        got = carry(pair.device, pair.edge, parts_before)
        pair.drop()
    else:
        pair.drop()
        pair.device.answer(job, Kind.ANSWER, bytes(30))
        got = []
    pair.device.begin()
    pair.edge.begin()
    assert got + pair.settle() == [Answered(step, bytes(30))]


def test_an_answer_does_not_go_out_before_it_is_asked_for_again() -> None:
    pair = Pair()
    pair.edge.request(b"?")
    job = only_job(pair.settle())
    pair.drop()
    pair.device.begin()
    pair.edge.begin()
    pair.device.answer(job, Kind.ANSWER, b"!")
    assert [frame.kind for frame in frames(pair.device)] == [Kind.HELLO]


def test_what_is_not_asked_again_is_forgotten_with_the_next_request() -> None:
    pair = Pair()
    given_up = pair.device.request(bytes(50))
    job = only_job(pair.settle())
    pair.drop()
    pair.device.abandon(given_up)
    pair.connect()
    assert not job.dropped
    pair.device.request(b"next")
    assert only_job(pair.settle()).payload == b"next"
    assert job.dropped and pair.edge.buffered_bytes == 4
    pair.edge.answer(job, Kind.ANSWER, b"late")
    assert pair.settle() == []


def test_a_request_that_is_given_up_before_it_is_sent_never_is() -> None:
    pair = Pair()
    steps = [pair.device.request(b"?") for _ in range(3)]
    pair.device.abandon(steps[1])
    assert [job.step for job in jobs(pair.settle())] == [steps[0], steps[2]]


@pytest.mark.parametrize("parts_before", [1, 5])
def test_the_late_answer_to_a_request_that_was_given_up_is_dropped(parts_before: int) -> None:
    pair = Pair()
    step = pair.device.request(bytes(50))
    events = carry(pair.device, pair.edge, parts_before)
    pair.device.abandon(step)
    pair.edge.answer(only_job(events + pair.settle()), Kind.ANSWER, bytes(20))
    assert pair.settle() == []
    following = pair.device.request(b"next")
    pair.edge.answer(only_job(pair.settle()), Kind.ANSWER, b"")
    assert pair.settle() == [Answered(following, b"")]


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_a_dialer_that_restarts_has_forgotten_the_requests_of_the_listener() -> None:
    pair = Pair()
    asked = pair.edge.request(b"asked")
    pair.settle()
    pair.drop()
    later = pair.edge.request(b"while it was away")
    pair.device = Session(b"D" * 16, LIMITS, dials=True)
    assert pair.connect() == [Lost((asked, later))]
    assert pair.edge.peer == b"D" * 16
    step = pair.edge.request(b"new")
    pair.device.answer(only_job(pair.settle()), Kind.ANSWER, b"!")
    assert pair.settle() == [Answered(step, b"!")]


def test_a_dialer_that_restarts_begins_its_steps_anew() -> None:
    pair = Pair()
    pair.device.request(b"old")
    old = only_job(pair.settle())
    pair.drop()
    pair.device = Session(b"D" * 16, LIMITS, dials=True)
    pair.connect()
    step = pair.device.request(b"new")
    new = only_job(pair.settle())
    assert new.step == old.step == step
    pair.edge.answer(old, Kind.ANSWER, b"to the old one")
    assert pair.settle() == []
    pair.edge.answer(new, Kind.ANSWER, b"to the new one")
    assert pair.settle() == [Answered(step, b"to the new one")]


def test_what_a_listener_asked_in_an_earlier_life_is_not_answered_to_the_next() -> None:
    pair = Pair()
    pair.edge.request(b"forgotten")
    forgotten = only_job(pair.settle())
    pair.drop()
    pair.edge = Session(b"E" * 16, LIMITS, dials=False)
    assert pair.connect() == []
    pair.device.answer(forgotten, Kind.ANSWER, b"")
    assert forgotten.dropped and not pair.device.has_frames


def test_a_listener_that_restarts_runs_the_request_that_it_is_asked_again() -> None:
    pair = Pair()
    step = pair.device.request(b"?")
    pair.settle()
    pair.drop()
    pair.edge = Session(b"E" * 16, LIMITS, dials=False)
    pair.device.begin()
    pair.edge.begin()
    pair.edge.answer(only_job(pair.settle()), Kind.ANSWER, b"!")
    assert pair.settle() == [Answered(step, b"!")]


# -- frames that break the rules ---------------------------------------------------------------------------------------


def listener(peer: bytes = DEVICE) -> Session:
    """A listener that has been greeted."""
    edge = Session(EDGE, LIMITS, dials=False)
    edge.begin()
    edge.receive(Frame(peer, Kind.HELLO))
    assert [frame.kind for frame in frames(edge)] == [Kind.WELCOME]
    return edge


def request(step: int, payload: bytes = b"", part: int = 0, total: int | None = None, acknowledged: int = 0) -> Frame:
    total = len(payload) if total is None else total
    return Frame(DEVICE, Kind.REQUEST, step, part, total, acknowledged, payload)


BROKEN: dict[str, tuple[list[Frame], str]] = {
    "a second greeting": ([Frame(DEVICE, Kind.HELLO)], "HELLO that was not due"),
    "the other greeting": ([Frame(DEVICE, Kind.WELCOME)], "WELCOME that was not due"),
    "another session": ([Frame(b"x" * 16, Kind.REQUEST, 1)], "of another session"),
    "a replay": ([request(1), request(1)], "REQUEST for step 1 again"),
    "backwards": ([request(2), request(1)], "REQUEST for step 1 again"),
    "a part too early": ([request(1, b"0123456789", part=1, total=20)], "part 1 of step 1 where part 0 is due"),
    "a part left out": (
        [request(1, b"01234", total=20), request(1, b"01234", part=2, total=20)],
        "part 2 of step 1 where part 1 is due",
    ),
    "a part again": ([request(1, b"01234", total=20)] * 2, "part 0 of step 1 where part 1 is due"),
    "another step between": (
        [request(1, b"01234", total=20), request(2, b"01234", part=1, total=20)],
        "a REQUEST for step 2 between the parts of a REQUEST for 1",
    ),
    "another total": ([request(1, b"01234", total=20), request(1, b"01234", part=1, total=21)], "between the parts"),
    "an ACK between": ([request(1, b"01234", total=20), Frame(DEVICE, Kind.ACK)], "between the parts"),
    "too much": ([request(1, b"0123456", total=10), request(1, b"0123456", part=1, total=10)], "more than 10 bytes"),
    "too many": ([request(step) for step in range(1, 5)], "more than 3 requests at once"),
    "too many bytes": ([request(1, bytes(10)), request(2, bytes(10), total=95)], "more than 100 bytes at once"),
    "an answer to nothing": ([Frame(DEVICE, Kind.ANSWER, 1)], "ANSWER to step 1, which does not wait"),
    "a failure of nothing": ([Frame(DEVICE, Kind.FAILURE, 7)], "FAILURE to step 7, which does not wait"),
    "too many acknowledged": ([Frame(DEVICE, Kind.ACK, acknowledged=1)], "1 answers acknowledged where 0 were"),
    "acknowledged in a request": ([request(1, acknowledged=2**64 - 1)], "answers acknowledged where 0 were"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_frame_that_may_not_come_is_refused(case: str) -> None:
    edge = listener()
    *fine, last = BROKEN[case][0]
    for frame in fine:
        edge.receive(frame)
    with pytest.raises(WireFormatError, match=BROKEN[case][1]):
        edge.receive(last)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind is not Kind.HELLO])
def test_nothing_comes_before_the_greeting(kind: Kind) -> None:
    edge = Session(EDGE, LIMITS, dials=False)
    edge.begin()
    with pytest.raises(WireFormatError):
        edge.receive(Frame(DEVICE, kind, step=1))


def test_a_greeting_acknowledges_nothing() -> None:
    edge = Session(EDGE, LIMITS, dials=False)
    edge.begin()
    with pytest.raises(WireFormatError):
        edge.receive(Frame(DEVICE, Kind.HELLO, acknowledged=1))


def test_an_answer_comes_once() -> None:
    edge = listener()
    step = edge.request(b"?")
    list(frames(edge))
    answer = Frame(DEVICE, Kind.ANSWER, step, 0, 1, 0, b"!")
    assert edge.receive(answer) == [Answered(step, b"!")]
    with pytest.raises(WireFormatError, match="does not wait"):
        edge.receive(answer)


def test_an_answer_does_not_come_before_the_request_has_gone_out() -> None:
    edge = listener()
    step = edge.request(bytes(50))
    for _ in range(4):
        edge.next_frame()
    with pytest.raises(WireFormatError, match="does not wait"):
        edge.receive(Frame(DEVICE, Kind.ANSWER, step, 0, 1, 0, b"!"))


def test_acknowledgements_do_not_go_back() -> None:
    edge = listener()
    (event,) = edge.receive(request(1))
    assert isinstance(event, Asked)
    edge.answer(event.job, Kind.ANSWER, b"")
    list(frames(edge))
    edge.receive(request(2, acknowledged=1))
    with pytest.raises(WireFormatError, match="0 answers acknowledged where 1 were"):
        edge.receive(request(3))


def test_a_request_that_has_been_answered_and_acknowledged_is_not_asked_again_after_a_drop() -> None:
    edge = listener()
    (event,) = edge.receive(request(1))
    assert isinstance(event, Asked)
    edge.answer(event.job, Kind.ANSWER, b"")
    list(frames(edge))
    edge.receive(Frame(DEVICE, Kind.ACK, acknowledged=1))
    edge.end()
    edge.begin()
    edge.receive(Frame(DEVICE, Kind.HELLO))
    with pytest.raises(WireFormatError, match="REQUEST for step 1 again"):
        edge.receive(request(1))


def test_a_failure_that_says_nothing_readable_is_refused() -> None:
    edge = listener()
    step = edge.request(b"?")
    list(frames(edge))
    with pytest.raises(WireFormatError, match="does not say what failed"):
        edge.receive(Frame(DEVICE, Kind.FAILURE, step, 0, 2, 0, b"\xff\xff"))


def test_a_size_that_is_only_announced_takes_no_memory() -> None:
    edge = listener()
    edge.receive(request(1, b"0123456789", total=100))
    assert edge.buffered_bytes == 10


# -- everything together -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_each_request_is_run_once_and_answered(seed: int) -> None:
    """Requests of both ends, answers in any order, drops at any frame: as a dialer and a listener that both live on."""
    chance = random.Random(seed)
    pair = Pair()
    asked: dict[tuple[str, int], bytes] = {}
    answered: dict[tuple[str, int], bytes] = {}
    run: list[tuple[str, int]] = []
    waiting: list[tuple[Session, Job]] = []

    def note(asker: str, other: str, receiver: Session, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Asked):
                assert event.job.payload == asked[other, event.job.step]
                run.append((other, event.job.step))
                waiting.append((receiver, event.job))
            else:
                assert isinstance(event, Answered) and (asker, event.step) not in answered
                answered[asker, event.step] = event.payload

    def move() -> bool:
        sent = [
            carry_one("device", pair.device, "edge", pair.edge),
            carry_one("edge", pair.edge, "device", pair.device),
        ]
        return any(sent)

    def carry_one(sender: str, source: Session, receiver: str, sink: Session) -> bool:
        frame = source.next_frame()
        if frame is not None:
            note(receiver, sender, sink, sink.receive(decode_frame(encode_frame(frame), LIMITS)))
        return frame is not None

    for _ in range(300):
        action = chance.random()
        if action < 0.2:
            name, session = chance.choice([("device", pair.device), ("edge", pair.edge)])
            payload = chance.randbytes(chance.choice([0, 1, 10, 35, 100]))
            asked[name, session.request(payload)] = payload
        elif action < 0.4 and waiting:
            receiver, job = waiting.pop(chance.randrange(len(waiting)))
            receiver.answer(job, Kind.ANSWER, chance.randbytes(chance.choice([0, 5, 25])))
        elif action < 0.45:
            pair.drop()
            pair.device.begin()
            pair.edge.begin()
        else:
            move()
    while move() or waiting:
        for receiver, job in waiting:
            receiver.answer(job, Kind.ANSWER, b"last")
        waiting.clear()
    assert sorted(run) == sorted(asked) == sorted(answered)
