"""Sessions over messages: the same answers, and nobody reaches the sessions of others."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
import torch

from gaisnet.config import WireSettings
from gaisnet.errors import (
    CutError,
    LinkTimeout,
    ServiceFull,
    SessionClosed,
    SessionRefused,
    UnexpectedMessage,
    WireFormatError,
)
from gaisnet.futures import as_future
from gaisnet.messages import (
    CloseSession,
    CropSession,
    Done,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
)
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.endpoint import RemoteSession, SessionEndpoint
from gaisnet.serving.generation.decoding import DeviceParts, generate
from gaisnet.serving.generation.speculation import generate_speculatively
from gaisnet.serving.generation.text import Sampling
from gaisnet.transport.codec import Codec
from tests.serving.models import generated, lively_model, prompt, served, served_domain
from tests.tiny import NUM_LAYERS

EXACT = WireSettings(session="float32", body_output="float32")
Served = tuple[DeviceParts, BodyService]
Ask = Callable[[Message], Message]


@pytest.fixture
def body() -> Iterator[Served]:
    parts, service = served(lively_model(), CutLayers(1, 1))
    with service.serving():
        yield parts, service


def over_bytes(service: BodyService, settings: WireSettings = EXACT, peer: str = "clinic") -> Ask:
    codec, endpoint = Codec(settings), SessionEndpoint(service, peer)

    def ask(message: Message) -> Message:
        answer = as_future(endpoint.handle(codec.decode(codec.encode(message)))).result(timeout=60)
        return codec.decode(codec.encode(answer))

    return ask


def remote(ask: Ask, parts: DeviceParts, num_positions: int = 0) -> RemoteSession:
    return RemoteSession(ask, parts.first, parts.stop, (), num_positions)


def test_an_answer_over_messages(body: Served) -> None:
    parts, service = body
    found = list(generate(parts, remote(over_bytes(service), parts, 40), prompt(7), Sampling(max_tokens=24)))
    assert found == generated(lively_model(), prompt(7), 24)
    assert (service.num_sessions, service.used_bytes) == (0, 0)


def test_rounded_rows_still_give_an_answer(body: Served) -> None:
    parts, service = body
    ask = over_bytes(service, WireSettings(session="int8", body_output="int8"))
    assert len(list(generate(parts, remote(ask, parts), prompt(7), Sampling(max_tokens=8)))) == 8


def test_rows_can_be_sent_without_waiting(body: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as they are on their way others can be; where they fail, the session stands where it stood."""
    parts, service = body
    endpoint = SessionEndpoint(service, "clinic")
    sessions = [RemoteSession(endpoint.handle, parts.first, parts.stop) for _ in range(3)]
    rows = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    sent = [session.send(rows, 1) for session in sessions]
    answers = [answer.result(timeout=60) for answer in sent]
    torch.testing.assert_close(answers[0], answers[2])
    with monkeypatch.context() as full:
        full.setattr(service, "_settings", service._settings.model_copy(update={"max_cache_mib": 0}))
        with pytest.raises(ServiceFull):
            sessions[0].send(torch.zeros(100, 32), 1).result(timeout=60)
    sessions[0].extend(rows[:1], 1)
    assert sessions[0]._length == 6


def test_an_answer_that_never_comes_is_not_waited_for_any_longer() -> None:
    never: Future[Message] = Future()
    with pytest.raises(LinkTimeout, match="waiting for a SessionOpened"):
        RemoteSession(lambda _: never, 1, 2, deadline_s=0.01)
    assert never.cancelled()


def test_speculation_over_messages() -> None:
    parts, large = served(lively_model(), CutLayers(1))
    _, _, small = served_domain(lively_model(), (0, 1, 3, 4, 5))
    with small.serving(), large.serving():
        sessions = remote(over_bytes(small), parts), remote(over_bytes(large), parts)
        found = list(generate_speculatively(parts, *sessions, prompt(7), Sampling(max_tokens=24)))
    assert found == generated(lively_model(), prompt(7), 24)


def test_a_peer_cannot_reach_the_sessions_of_another(body: Served) -> None:
    _, service = body
    own, other = over_bytes(service), over_bytes(service, peer="thief")
    opened = own(OpenSession(1, NUM_LAYERS - 1, (), 0))
    assert isinstance(opened, SessionOpened)
    for message in (ExtendSession(opened.session, 0, 1, torch.zeros(1, 32)), CropSession(opened.session, 0)):
        with pytest.raises(SessionClosed):
            other(message)
    assert other(CloseSession(opened.session)) == Done()
    assert service.num_sessions == 1


def test_a_peer_that_is_gone_leaves_nothing(body: Served) -> None:
    _, service = body
    endpoint = SessionEndpoint(service, "clinic")
    for _ in range(3):
        endpoint.handle(OpenSession(1, 2, (), 10))
    assert service.used_bytes > 0
    endpoint.close()
    assert (service.num_sessions, service.used_bytes) == (0, 0)


def test_what_the_service_refuses(body: Served) -> None:
    parts, service = body
    ask = over_bytes(service)
    with pytest.raises(CutError):
        RemoteSession(ask, 0, 3)
    with pytest.raises(WireFormatError):
        ask(OpenSession(1, 2, (), 0)) and remote(ask, parts).extend(torch.zeros(1, 7), 1)
    with pytest.raises(UnexpectedMessage):
        ask(Done())
    session = remote(ask, parts)
    session.extend(torch.zeros(3, 32), 1)
    with pytest.raises(SessionRefused, match="position 9"):
        ask(ExtendSession(session._open_name(), 9, 1, torch.zeros(1, 32)))
    session.close()
    session.close()
    with pytest.raises(SessionClosed):
        session.extend(torch.zeros(1, 32), 1)


def test_a_full_service_says_so(body: Served) -> None:
    parts, service = body
    service._settings = service._settings.model_copy(update={"max_sessions": 1})
    remote(over_bytes(service), parts)
    with pytest.raises(ServiceFull):
        remote(over_bytes(service), parts)


@pytest.mark.parametrize("answer", [Done(), SessionRows(torch.zeros(2, 32)), SessionRows(torch.zeros(1, 7))])
def test_an_answer_that_does_not_fit_is_refused(answer: Message) -> None:
    session = RemoteSession(lambda message: SessionOpened("a") if isinstance(message, OpenSession) else answer, 1, 2)
    with pytest.raises((UnexpectedMessage, WireFormatError)):
        session.extend(torch.zeros(3, 32), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: OpenSession(0, 1, (), -1),
        lambda: ExtendSession("a", 0, 3, torch.zeros(2, 4)),
        lambda: ExtendSession("a", -1, 1, torch.zeros(2, 4)),
        lambda: ExtendSession("a", 0, 1, torch.zeros(4)),
        lambda: SessionRows(torch.zeros(4)),
    ],
)
def test_messages_that_cannot_be_meant(wrong: Callable[[], Message]) -> None:
    with pytest.raises(ValueError):
        wrong()
