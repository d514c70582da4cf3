"""Messages over a link for bytes: frames both ways, counted once, and every way that a request can end."""

from concurrent.futures import CancelledError, Future

import pytest
import torch

from gaisnet.config import WireSettings
from gaisnet.errors import LinkLost, LinkTimeout, MessageTooLarge, PeerError, UnexpectedMessage, WireFormatError
from gaisnet.messages import BodyOutput, BodyOutputGrad, Done, FineTune, Message, SmashRequest
from gaisnet.transport.base import Handler, wait_for
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, coded
from gaisnet.transport.ledger import Direction, Ledger, LinkKind, Traffic
from tests.frames import Frames

EXACT = Codec(WireSettings(body_output="float32", gradient="float32"))
ASK = SmashRequest("train")


class Wire:
    """A link for bytes that answers when a test says so."""

    def __init__(self) -> None:
        self.peer = "life"
        self.sent: list[bytes] = []
        self.answers: list[Future[bytes]] = []

    def send(self, payload: bytes) -> Future[bytes]:
        self.sent.append(payload)
        self.answers.append(Future())
        return self.answers[-1]


class FullWire(Wire):
    """One that lets nothing through."""

    def send(self, payload: bytes) -> Future[bytes]:
        raise MessageTooLarge("edge", len(payload), 10)


class Echo:
    """Gives rows back as a gradient."""

    def handle(self, message: Message) -> Message:
        if not isinstance(message, BodyOutput):
            raise UnexpectedMessage("an echo", type(message).__name__)
        return BodyOutputGrad(message.step, 0.5, message.rows_ND)


def output() -> BodyOutput:
    rows_ND = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    return BodyOutput("train", 7, 3, torch.arange(3, dtype=torch.int32), rows_ND)


def answered(handler: Handler, frame: bytes) -> bytes:
    reply = coded(handler, EXACT)("edge", frame)
    return reply.result(timeout=1) if isinstance(reply, Future) else reply


def link_over(
    wire: Wire, ledger: Ledger | None = None, codec: Codec = EXACT, direction: Direction = "down"
) -> CodedLink:
    return CodedLink(wire, codec, ledger or Ledger(), "device_edge", direction)


@pytest.mark.parametrize("kind", ["device_edge", "edge_cloud"])
@pytest.mark.parametrize(("there", "back"), [("up", "down"), ("down", "up")])
def test_frames_go_both_ways_and_the_end_that_asks_counts_them(
    kind: LinkKind, there: Direction, back: Direction
) -> None:
    wire, ledger, sent = Wire(), Frames(), output()
    answer = CodedLink(wire, EXACT, ledger, kind, there).send(sent)
    assert not answer.done()
    (request,) = wire.sent
    reply = answered(Echo(), request)
    wire.answers[0].set_result(reply)
    received = answer.result(timeout=1)
    assert isinstance(received, BodyOutputGrad) and torch.equal(received.grad_ND, sent.rows_ND)
    assert ledger.frames == [(kind, there, request), (kind, back, reply)]
    expected = {there: len(request), back: len(reply)}
    assert ledger.traffic(kind) == Traffic(bytes_up=expected["up"], bytes_down=expected["down"])


def test_requests_are_under_way_side_by_side_and_may_be_answered_in_any_order() -> None:
    wire = Wire()
    link = link_over(wire)
    first, second = link.send(ASK), link.send(output())
    wire.answers[1].set_result(answered(Echo(), wire.sent[1]))
    assert isinstance(second.result(timeout=1), BodyOutputGrad) and not first.done()
    wire.answers[0].set_result(EXACT.encode(Done()))
    assert first.result(timeout=1) == Done()


def test_the_other_ends_life_is_that_of_the_link_below() -> None:
    wire = Wire()
    link = link_over(wire)
    lives = []
    for life in ("life", "", "another"):
        wire.peer = life
        lives.append(link.peer)
    assert lives == ["life", "", "another"]


@pytest.mark.parametrize("error", [LinkLost("edge", "it restarted"), PeerError("edge", "UnexpectedMessage", "no")])
def test_an_error_of_the_link_or_of_the_other_end_comes_through(error: Exception) -> None:
    wire, ledger = Wire(), Ledger()
    answer = link_over(wire, ledger).send(ASK)
    wire.answers[0].set_exception(error)
    assert answer.exception(timeout=1) is error
    assert ledger.traffic("device_edge") == Traffic(bytes_up=0, bytes_down=len(wire.sent[0]))


@pytest.mark.parametrize("frame", [b"", b"no frame", b"\xff" * 64], ids=["empty", "text", "noise"])
def test_an_answer_that_is_no_message_is_the_error_of_its_request(frame: bytes) -> None:
    wire = Wire()
    link = link_over(wire)
    bad, good = link.send(ASK), link.send(ASK)
    wire.answers[0].set_result(frame)
    wire.answers[1].set_result(EXACT.encode(Done()))
    assert isinstance(bad.exception(timeout=1), WireFormatError)
    assert good.result(timeout=1) == Done()


def test_an_answer_that_cannot_be_read_for_any_other_reason_leaves_nobody_waiting() -> None:
    wire, ledger = Wire(), Ledger()
    answer = link_over(wire, ledger).send(ASK)
    wire.answers[0].set_exception(MemoryError("too much"))
    assert isinstance(answer.exception(timeout=1), MemoryError)


def test_a_message_that_the_link_does_not_take_is_the_error_of_its_request() -> None:
    ledger = Ledger()
    answer = link_over(FullWire(), ledger).send(ASK)
    assert isinstance(answer.exception(timeout=1), MessageTooLarge)
    assert ledger.traffic("device_edge") == Traffic()


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_to_give_up_a_request_gives_it_up_on_the_link_below() -> None:
    wire = Wire()
    answer = link_over(wire).send(ASK)
    assert answer.cancel() and answer.cancelled()
    assert wire.answers[0].cancelled()
    with pytest.raises(CancelledError):
        answer.result(timeout=1)


def test_a_wait_that_is_over_gives_up_on_the_link_below() -> None:
    wire = Wire()
    link = link_over(wire)
    answer = link.send(ASK)
    with pytest.raises(LinkTimeout):
        wait_for(link, answer, Done, "asked", "the peer", deadline_s=0.0, away_s=0.0)
    assert wire.answers[0].cancelled()


@pytest.mark.parametrize("late", [EXACT.encode(Done()), LinkLost("edge", "closed")], ids=["answer", "error"])
def test_what_comes_after_giving_up_is_dropped(late: bytes | Exception, caplog: pytest.LogCaptureFixture) -> None:
    wire, ledger = Wire(), Ledger()
    answer = link_over(wire, ledger).send(ASK)
    wire.answers[0].set_running_or_notify_cancel()  # the link below is past the point where it could be given up
    answer.cancel()
    if isinstance(late, bytes):
        wire.answers[0].set_result(late)
    else:
        wire.answers[0].set_exception(late)
    assert answer.cancelled()
    assert caplog.records == []


# -- the other end -----------------------------------------------------------------------------------------------------


def test_the_tier_at_the_other_end_answers_frames_and_raises_what_it_raises() -> None:
    reply = EXACT.decode(answered(Echo(), EXACT.encode(output())))
    assert isinstance(reply, BodyOutputGrad)
    with pytest.raises(UnexpectedMessage, match="an echo does not take a FineTune"):
        answered(Echo(), EXACT.encode(FineTune(1)))
    with pytest.raises(WireFormatError):
        answered(Echo(), b"no frame")


def test_a_tier_that_answers_later_does_so_in_frames() -> None:
    class Slow:
        def __init__(self) -> None:
            self.answers: list[Future[Message]] = []

        def handle(self, message: Message) -> Future[Message]:
            self.answers.append(Future())
            return self.answers[-1]

    slow = Slow()
    first, second = (coded(slow, EXACT)("edge", EXACT.encode(ASK)) for _ in range(2))
    assert isinstance(first, Future) and isinstance(second, Future)
    slow.answers[1].set_exception(UnexpectedMessage("it", "Done"))
    slow.answers[0].set_result(Done())
    assert EXACT.decode(first.result(timeout=0)) == Done()
    with pytest.raises(UnexpectedMessage):
        second.result(timeout=0)
