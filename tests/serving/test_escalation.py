"""Sessions at an edge: handed over to the foundation model in the middle of an answer, or there from the beginning."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from gaisnet.config import WireSettings
from gaisnet.errors import (
    BodyUnreachable,
    ContextFull,
    PeerError,
    QuotaReached,
    ServiceFull,
    SessionClosed,
    SessionRefused,
    UnexpectedMessage,
    UnknownAdapter,
)
from gaisnet.futures import as_future, failed, flat_map, map_result
from gaisnet.messages import CloseSession, CropSession, Done, EscalateSession, ExtendSession, Message, OpenSession
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.endpoint import RemoteSession, SessionEndpoint
from gaisnet.serving.engine.escalation import EdgeSessions
from gaisnet.serving.generation.decoding import CachedHead, CachedTail, DeviceParts
from gaisnet.transport.codec import Codec
from tests.serving.models import DOMAIN, adapter, generated, lively_model, prompt, served, served_domain, with_adapters

EXACT = Codec(WireSettings(session="float32", body_output="float32"))


@dataclass
class Cloud:
    """The FM's end of a link that can be cut."""

    service: BodyService
    peer: str = "here"
    asked: list[Message] = field(default_factory=list)
    broken: Exception | None = None

    def __post_init__(self) -> None:
        self.endpoint = SessionEndpoint(self.service, "edge")

    def send(self, message: Message) -> Future[Message]:
        self.asked.append(message)
        if self.broken is not None and isinstance(message, ExtendSession):
            return failed(self.broken)
        try:
            answer = as_future(self.endpoint.handle(EXACT.decode(EXACT.encode(message))))
        except Exception as error:
            return failed(error)
        return map_result(answer, lambda reply: EXACT.decode(EXACT.encode(reply)))


@dataclass
class Place:
    """A device, its edge with a DM that lost layers, and the cloud."""

    parts: DeviceParts
    small: BodyService
    large: BodyService

    def __post_init__(self) -> None:
        self.cloud = Cloud(self.large)
        self.edge = EdgeSessions(self.small, self.cloud, "clinic")

    def ask(self, message: Message) -> Message:
        answer = as_future(self.edge.handle(EXACT.decode(EXACT.encode(message))))
        return EXACT.decode(EXACT.encode(answer.result(timeout=60)))

    def session(self, may_escalate: bool = True, num_positions: int = 40) -> RemoteSession:
        return RemoteSession(self.ask, self.parts.first, self.parts.stop, (), num_positions, may_escalate=may_escalate)

    @property
    def held(self) -> tuple[int, int, int, int]:
        """Sessions and bytes at both ends."""
        return self.small.num_sessions, self.small.used_bytes, self.large.num_sessions, self.large.used_bytes


@pytest.fixture
def place() -> Iterator[Place]:
    _, _, small = served_domain(lively_model(), (0, 1, 3, 4, 5))
    parts, large = served(lively_model(), CutLayers(1))
    large.install_adapter("law", 0, DOMAIN, adapter(DOMAIN, 1))
    with small.serving(), large.serving():
        yield Place(parts, small, large)


def rows(num: int, seed: int = 0) -> Tensor:
    return torch.randn(num, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adapters", [(), ("law",)])
def test_the_fm_goes_on_as_if_it_had_had_the_session_from_the_beginning(
    place: Place, adapters: tuple[str, ...]
) -> None:
    """The device gives nothing twice, and goes on, back and on without knowing who answers."""
    session, head = place.session(), CachedHead(place.parts)
    tail, ids = CachedTail(place.parts, session), prompt(7)
    tail.compute_logits(head.smash(ids[:4]), want=0)
    tail.compute_logits(head.smash(ids[4:]), want=1)
    tail.compute_logits(head.smash([11, 12]), want=1)
    tail.crop(7)  # what was gone back behind is not escalated
    head.crop(7)
    logits_V = place.parts.tail.logits(session.escalate(adapters, 1))[0]
    found: list[int] = []
    while len(found) < 12:
        found.append(int(logits_V.argmax()))
        logits_V = tail.compute_logits(head.smash(found[-1:]), want=1)[0]
        if len(found) == 6:  # a draft that is refused
            tail.compute_logits(head.smash([1, 2, 3]), want=1)
            length = len(ids) + len(found)
            tail.crop(length)
            head.crop(length)
    whole = with_adapters(lively_model(), law=(DOMAIN, adapter(DOMAIN, 1))) if adapters else lively_model()
    assert found == generated(whole, ids, 12)
    assert place.held[:2] == (0, 0) and place.held[2] == 1
    session.close()
    assert place.held == (0, 0, 0, 0)


def test_a_session_of_the_fm_from_the_beginning(place: Place) -> None:
    session = RemoteSession(place.ask, place.parts.first, place.parts.stop, ("law",), 40, body="foundation")
    assert session.versions == ("law@0",)
    whole = with_adapters(lively_model(), law=(DOMAIN, adapter(DOMAIN, 1)))
    head, tail = CachedHead(place.parts), CachedTail(place.parts, session)
    logits_V = tail.compute_logits(head.smash(prompt(7)))[0]
    assert int(logits_V.argmax()) == generated(whole, prompt(7), 1)[0]
    assert place.held[:2] == (0, 0)
    session.close()
    assert place.held == (0, 0, 0, 0)


def test_kept_rows_count_as_memory_and_go_with_the_session(place: Place) -> None:
    plain, keeping = place.session(may_escalate=False, num_positions=64), place.session(num_positions=64)
    both = place.small.used_bytes
    plain.close()
    assert place.small.used_bytes - (both - place.small.used_bytes) == 64 * 32 * 4
    keeping.close()
    assert place.held == (0, 0, 0, 0)


def cut_off(place: Place) -> None:
    place.cloud.peer = ""


def lose_rows(place: Place) -> None:
    place.cloud.broken = ServiceFull("rows", "no room")


def full(place: Place) -> None:
    place.large._settings = place.large._settings.model_copy(update={"max_sessions": 0})


@pytest.mark.parametrize(
    ("spoil", "error"), [(cut_off, BodyUnreachable), (full, ServiceFull), (lose_rows, ServiceFull)]
)
def test_a_session_that_cannot_be_escalated_goes_on_at_the_edge(
    place: Place, spoil: Callable[[Place], None], error: type[Exception]
) -> None:
    session, other = place.session(), place.session()
    session.extend(rows(5), 1)
    other.extend(torch.cat([rows(5), rows(2, 1)]), 1)
    spoil(place)
    with pytest.raises(error):
        session.escalate((), 1)
    assert place.large.num_sessions == 0
    found, expected = session.extend(rows(2, 1), 2), other.extend(rows(1, 2), 1)
    assert found.shape == (2, 32) and expected.shape == (1, 32)
    torch.testing.assert_close(session.extend(rows(1, 2), 1), expected, atol=1e-4, rtol=1e-3)


def test_what_cannot_be_escalated(place: Place) -> None:
    plain, empty, twice = place.session(may_escalate=False), place.session(), place.session()
    plain.extend(rows(3), 1)
    twice.extend(rows(3), 1)
    with pytest.raises(SessionRefused, match="does not keep"):
        plain.escalate((), 1)
    with pytest.raises(SessionRefused, match="it has 0"):
        empty.escalate((), 1)
    with pytest.raises(SessionRefused, match="4 are wanted"):
        twice.escalate((), 4)
    with pytest.raises(UnknownAdapter):
        twice.escalate(("art",), 1)
    assert twice.escalate((), 3).shape == (3, 32)
    with pytest.raises(SessionRefused, match="has it"):
        twice.escalate((), 1)
    with pytest.raises(SessionClosed):
        place.ask(EscalateSession("nobody's", (), 1))


def test_a_device_that_is_gone_leaves_nothing_at_either_end(place: Place) -> None:
    place.session()
    moved = place.session()
    moved.extend(rows(3), 1)
    moved.escalate((), 1)
    RemoteSession(place.ask, place.parts.first, place.parts.stop, (), 40, body="foundation")
    place.edge.close()
    assert place.held == (0, 0, 0, 0)


class Held(Cloud):
    """Answers when it is told."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gates: list[Future[None]] = []

    def send(self, message: Message) -> Future[Message]:
        gate: Future[None] = Future()
        self.gates.append(gate)
        return flat_map(gate, lambda _: Cloud.send(self, message))


def test_what_a_device_does_while_its_session_is_on_the_way(place: Place) -> None:
    place.cloud = Held(place.large)
    place.edge = EdgeSessions(place.small, place.cloud, "clinic")
    session = place.session()
    session.extend(rows(3), 1)
    name = session._open_name()
    moved = as_future(place.edge.handle(EscalateSession(name, (), 1)))
    for message in (ExtendSession(name, 3, 1, rows(1)), CropSession(name, 0), EscalateSession(name, (), 1)):
        with pytest.raises(SessionRefused, match="on its way"):
            place.edge.handle(message)
    assert place.edge.handle(CloseSession(name)) == Done()  # the answer is no longer wanted
    assert place.small.num_sessions == 0
    for number in range(3):  # opening, rows, closing
        place.cloud.gates[number].set_result(None)
        if number == 1:
            moved.result(timeout=60)
    assert place.held == (0, 0, 0, 0)


def test_a_session_that_opens_at_the_cloud_after_its_device_has_gone_is_ended(place: Place) -> None:
    place.cloud = Held(place.large)
    place.edge = EdgeSessions(place.small, place.cloud, "clinic")
    answer = as_future(place.edge.handle(OpenSession(1, 6, (), 8, "foundation")))
    place.edge.close()
    place.cloud.gates[0].set_result(None)
    with pytest.raises(SessionClosed):
        answer.result(timeout=60)
    assert place.large.num_sessions == 1  # until the cloud hears of it
    place.cloud.gates[1].set_result(None)
    assert place.held == (0, 0, 0, 0)


def test_a_session_that_ends_while_the_cloud_is_away_ends_there_as_well(place: Place) -> None:
    place.cloud = Held(place.large)
    place.edge = EdgeSessions(place.small, place.cloud, "clinic")
    answer = as_future(place.edge.handle(OpenSession(1, 6, (), 8, "foundation")))
    place.cloud.gates[0].set_result(None)
    name = answer.result(timeout=60).session  # type: ignore[attr-defined]
    place.cloud.peer = ""
    with pytest.raises(BodyUnreachable):
        as_future(place.edge.handle(CloseSession(name))).result(timeout=60)
    place.cloud.gates[1].set_result(None)  # it is back
    assert place.held == (0, 0, 0, 0)


def test_one_device_cannot_have_all_that_its_edge_may_have_at_the_cloud(place: Place) -> None:
    greedy = EdgeSessions(place.small, place.cloud, "clinic", share=0.5, max_at_cloud=4)
    there = OpenSession(1, 6, (), 8, "foundation")
    session = RemoteSession(greedy.handle, 1, 6, (), 8, may_escalate=True)
    session.extend(rows(3), 1)
    session.escalate((), 1)
    as_future(greedy.handle(there)).result(timeout=60)
    with pytest.raises(QuotaReached, match="'clinic': it has 2 open, and one peer may have 2"):
        greedy.handle(there)
    other = EdgeSessions(place.small, place.cloud, "ward", share=0.5, max_at_cloud=4)
    as_future(other.handle(there)).result(timeout=60)
    session.close()
    as_future(greedy.handle(there)).result(timeout=60)
    greedy.close()
    other.close()
    assert place.held == (0, 0, 0, 0)


def test_the_edge_serves_nothing_else(place: Place) -> None:
    with pytest.raises(UnexpectedMessage):
        place.ask(Done())


def raises(error: Exception) -> Callable[[Message], Message]:
    def ask(message: Message) -> Message:
        raise error

    return ask


@pytest.mark.parametrize(
    "kind", [ServiceFull, QuotaReached, SessionClosed, ContextFull, SessionRefused, UnknownAdapter]
)
def test_what_another_process_raised_is_raised_again(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="no room, says the other"):
        RemoteSession(raises(PeerError("edge", kind.__name__, "no room, says the other")), 1, 2)


def test_what_nobody_expects_of_another_process_stays_an_error_of_the_link() -> None:
    for kind in ("InternalError", "NotFinite", "PeerError"):
        with pytest.raises(PeerError):
            RemoteSession(raises(PeerError("edge", kind, "no")), 1, 2)


def test_messages_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError):
        EscalateSession("a", (), -1)
    with pytest.raises(ValueError):
        OpenSession(1, 2, (), -1)
