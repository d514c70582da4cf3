"""The link inside one process: what it counts is what a network would carry, and what arrives is a copy."""

import pytest
import torch

from gaisnet.config import WireSettings
from gaisnet.errors import MessageTooLarge, UnexpectedMessage
from gaisnet.messages import BodyOutput, BodyOutputGrad, Done, FineTune, Message, SmashRequest
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Direction, Ledger, LinkKind, Traffic
from gaisnet.transport.local import LocalLink
from tests.frames import Frames

EXACT = Codec(WireSettings(body_output="float32", gradient="float32"))


class Echo:
    """Keeps what it is given and gives the rows back as a gradient."""

    def __init__(self) -> None:
        self.taken: list[Message] = []
        self.given: list[Message] = []

    def handle(self, message: Message) -> Message:
        self.taken.append(message)
        if isinstance(message, FineTune):
            raise UnexpectedMessage("an echo", "FineTune")
        rows = isinstance(message, BodyOutput)
        self.given.append(BodyOutputGrad(message.step, 0.5, message.rows_ND) if rows else Done())  # type: ignore[attr-defined]
        return self.given[-1]


def output(num_rows: int = 3) -> BodyOutput:
    rows_ND = torch.randn(num_rows, 4, generator=torch.Generator().manual_seed(0))
    return BodyOutput("train", 7, num_rows, torch.arange(num_rows, dtype=torch.int32), rows_ND)


@pytest.mark.parametrize("kind", ["device_edge", "edge_cloud"])
@pytest.mark.parametrize(("there", "back"), [("up", "down"), ("down", "up")])
def test_bytes_are_those_of_the_frames_each_in_its_direction(kind: LinkKind, there: Direction, back: Direction) -> None:
    ledger, echo = Frames(), Echo()
    sent = output()
    answer = LocalLink(echo, EXACT, ledger, kind, there).send(sent).result()
    (first_kind, first_direction, first), (second_kind, second_direction, second) = ledger.frames
    assert (first_kind, first_direction, second_kind, second_direction) == (kind, there, kind, back)
    assert isinstance(EXACT.decode(first), BodyOutput) and isinstance(EXACT.decode(second), BodyOutputGrad)
    sizes = {there: len(first), back: len(second)}
    assert sizes == {there: len(EXACT.encode(sent)), back: len(EXACT.encode(answer))}
    assert sizes["up"] != sizes["down"]
    assert ledger.traffic(kind) == Traffic(bytes_up=sizes["up"], bytes_down=sizes["down"])
    assert ledger.traffic("edge_cloud" if kind == "device_edge" else "device_edge") == Traffic(0, 0)


def test_links_of_a_kind_are_counted_together_and_others_apart() -> None:
    ledger = Ledger()
    request, done = len(EXACT.encode(SmashRequest("test"))), len(EXACT.encode(Done()))
    for _ in range(2):
        LocalLink(Echo(), EXACT, ledger, "device_edge", "down").send(SmashRequest("test")).result()
    LocalLink(Echo(), EXACT, ledger, "edge_cloud", "up").send(SmashRequest("test")).result()
    assert ledger.traffic("device_edge") == Traffic(bytes_up=2 * done, bytes_down=2 * request)
    assert ledger.traffic("edge_cloud") == Traffic(bytes_up=request, bytes_down=done)


def test_both_ends_have_equal_tensors_of_their_own() -> None:
    echo, sent = Echo(), output()
    answer = LocalLink(echo, EXACT, Ledger(), "device_edge", "down").send(sent).result()
    (taken,), (given,) = echo.taken, echo.given
    assert isinstance(taken, BodyOutput) and isinstance(given, BodyOutputGrad) and isinstance(answer, BodyOutputGrad)
    assert torch.equal(taken.rows_ND, sent.rows_ND) and torch.equal(answer.grad_ND, given.grad_ND)
    expected = sent.rows_ND.clone()
    taken.rows_ND.zero_()
    assert torch.equal(sent.rows_ND, expected) and torch.equal(answer.grad_ND, expected)


def test_what_arrives_has_the_error_of_the_wire() -> None:
    echo, sent = Echo(), output()
    coarse = Codec(WireSettings(body_output="int8", gradient="float32"))
    LocalLink(echo, coarse, Ledger(), "device_edge", "down").send(sent).result()
    (taken,) = echo.taken
    assert isinstance(taken, BodyOutput)
    assert not torch.equal(taken.rows_ND, sent.rows_ND)
    torch.testing.assert_close(taken.rows_ND, sent.rows_ND, atol=0.02, rtol=0.0)


def test_an_error_of_the_other_end_comes_through_and_the_request_counts() -> None:
    ledger = Ledger()
    with pytest.raises(UnexpectedMessage, match="an echo does not take a FineTune"):
        LocalLink(Echo(), EXACT, ledger, "device_edge", "down").send(FineTune(1)).result()
    assert ledger.traffic("device_edge") == Traffic(bytes_up=0, bytes_down=len(EXACT.encode(FineTune(1))))


def test_a_message_over_the_limit_of_transfers_reaches_nobody() -> None:
    echo, small = Echo(), Codec(WireSettings(max_message_bytes=2**16, max_transfer_bytes=2**16))
    with pytest.raises(MessageTooLarge, match="the limit is 65536; raise wire.max_transfer_bytes"):
        LocalLink(echo, small, Ledger(), "device_edge", "down").send(output(9000)).result()
    assert echo.taken == []
