"""What stands between a tier, its body's service and the peers of both."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import ServiceSettings
from gaisnet.engines.body_hosting import BodyPublisher, PeerRouter
from gaisnet.errors import QuotaReached, SessionClosed, SessionRefused, UnexpectedMessage
from gaisnet.messages import (
    CloseSession,
    Done,
    ExtendSession,
    Message,
    OpenSession,
    SessionOpened,
    SessionRows,
    SmashRequest,
)
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.serving.engine.endpoint import SessionEndpoint
from tests.clock import Clock
from tests.serving.models import DOMAIN, adapter, lively_model
from tests.tiny import NUM_LAYERS

OPEN = OpenSession(0, NUM_LAYERS, (), 10)


def new_body() -> Body:
    return cut_decoder(Decoder(lively_model()), CutLayers(0))[1]


@pytest.fixture
def publisher() -> Iterator[BodyPublisher]:
    publisher = BodyPublisher(ServiceSettings(), ComputeLock())
    publisher.publish_body(new_body(), range(NUM_LAYERS))
    yield publisher
    publisher.close()


class Tier:
    """Takes everything."""

    def __init__(self) -> None:
        self.taken: list[Message] = []

    def handle(self, message: Message) -> Message:
        self.taken.append(message)
        return Done()


class Peer:
    """Has a router of its own."""

    def __init__(
        self, publisher: BodyPublisher, tier: Tier | None = None, name: str = "clinic", share: float = 1.0
    ) -> None:
        self.life = "first"
        self.router = PeerRouter(
            tier, publisher, lambda service: SessionEndpoint(service, name, share), name, lambda: self.life
        )

    def open(self, asked: OpenSession = OPEN) -> str:
        opened = self.router.handle(asked)
        assert isinstance(opened, SessionOpened)
        return opened.session

    def extend(self, name: str) -> Message:
        answer = self.router.handle(ExtendSession(name, 0, 1, torch.zeros(2, 32)))
        assert not isinstance(answer, Message)
        return answer.result(timeout=60)


def test_sessions_go_to_the_service_and_all_else_to_the_tier(publisher: BodyPublisher) -> None:
    tier = Tier()
    peer = Peer(publisher, tier)
    assert isinstance(peer.extend(peer.open()), SessionRows)
    assert peer.router.handle(SmashRequest("test")) == Done()
    assert tier.taken == [SmashRequest("test")]
    with pytest.raises(UnexpectedMessage, match="'clinic' does not take a SmashRequest"):
        Peer(publisher).router.handle(SmashRequest("test"))


def test_a_peer_cannot_reach_the_sessions_of_another(publisher: BodyPublisher) -> None:
    name = Peer(publisher).open()
    with pytest.raises(SessionClosed):
        Peer(publisher).extend(name)


def test_a_peer_that_restarted_has_no_sessions(publisher: BodyPublisher) -> None:
    peer, other = Peer(publisher), Peer(publisher)
    name, others = peer.open(), other.open()
    peer.life = "second"
    with pytest.raises(SessionClosed):
        peer.extend(name)
    assert publisher.service.num_sessions == 1
    assert isinstance(other.extend(others), SessionRows)


def test_what_a_restarted_peer_left_goes_before_it_asks_again(publisher: BodyPublisher) -> None:
    peer = Peer(publisher)
    peer.open()
    peer.router.end_stale_sessions(60.0)
    assert publisher.service.num_sessions == 1
    peer.life = "second"
    peer.router.end_stale_sessions(60.0)
    assert publisher.service.num_sessions == 0


def test_a_peer_that_stays_away_loses_its_sessions(publisher: BodyPublisher, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.install(monkeypatch, "gaisnet.engines.body_hosting")
    peer = Peer(publisher)
    name = peer.open()
    for away_s, num_left in ((50.0, 1), (0.0, 1), (50.0, 1), (11.0, 0)):
        peer.life = "" if away_s else "first"  # it comes back once
        clock.sleep(away_s)
        peer.router.end_stale_sessions(60.0)
        assert publisher.service.num_sessions == num_left
    peer.life = "first"
    with pytest.raises(SessionClosed):
        peer.extend(name)


def test_a_drop_of_the_link_ends_nothing(publisher: BodyPublisher) -> None:
    peer = Peer(publisher)
    name = peer.open()
    peer.life = ""
    peer.router.end_stale_sessions(60.0)
    peer.life = "first"
    assert isinstance(peer.extend(name), SessionRows)


def test_another_body_ends_the_sessions_of_the_one_before(publisher: BodyPublisher) -> None:
    peer = Peer(publisher)
    before, name = publisher.service, peer.open()
    publisher.publish_body(new_body(), range(NUM_LAYERS))
    assert (before.num_sessions, before.in_thread) == (0, False)
    with pytest.raises(SessionClosed):
        peer.extend(name)
    assert isinstance(peer.extend(peer.open()), SessionRows)


def test_before_there_is_a_body_nobody_is_served() -> None:
    publisher = BodyPublisher(ServiceSettings(), ComputeLock())
    publisher.publish_adapter("law", 0, DOMAIN, adapter(DOMAIN, 1))  # that of a model that is gone
    with pytest.raises(SessionRefused, match="no model here yet"):
        Peer(publisher).open()
    publisher.publish_body(new_body(), range(NUM_LAYERS))
    publisher.publish_adapter("law", 0, DOMAIN, adapter(DOMAIN, 1))
    assert publisher.service.adapters == ["law"]
    publisher.close()
    with pytest.raises(SessionRefused):
        Peer(publisher).open()


def test_the_end_of_a_front_ends_its_sessions(publisher: BodyPublisher) -> None:
    peer = Peer(publisher)
    peer.open()
    peer.router.close()
    peer.router.close()
    assert publisher.service.num_sessions == 0


def limited(**settings: int) -> BodyPublisher:
    publisher = BodyPublisher(ServiceSettings.model_validate(settings), ComputeLock())
    publisher.publish_body(new_body(), range(NUM_LAYERS))
    return publisher


def test_one_peer_cannot_have_all_sessions() -> None:
    with closing(limited(max_sessions=5)) as publisher:
        greedy, ward = (Peer(publisher, name=name, share=0.5) for name in ("clinic", "ward"))
        for _ in range(2):
            greedy.open()
        with pytest.raises(QuotaReached, match="a new session of 'clinic': it has 2 open, and one peer may have 2"):
            greedy.open()
        assert isinstance(ward.extend(ward.open()), SessionRows)
        greedy.life = "second"
        greedy.router.end_stale_sessions(60.0)
        assert [greedy.open() for _ in range(2)]  # what it left counts no more


def test_one_peer_cannot_have_all_memory() -> None:
    wanted = OpenSession(0, NUM_LAYERS, (), 100)
    with closing(limited(max_cache_mib=1, max_sessions=64)) as publisher:
        greedy, ward = (Peer(publisher, name=name, share=0.5) for name in ("clinic", "ward"))
        first = greedy.open(wanted)
        while publisher.service.used_bytes + publisher.service.used_bytes // publisher.service.num_sessions <= 2**19:
            greedy.open(wanted)
        for _ in range(2):
            with pytest.raises(QuotaReached, match="memory for a session of 'clinic': it holds .* one peer may hold"):
                greedy.open(wanted)
        assert isinstance(ward.extend(ward.open(wanted)), SessionRows)
        greedy.router.handle(CloseSession(first))
        assert isinstance(greedy.extend(greedy.open(wanted)), SessionRows)


def test_a_peer_that_has_gone_leaves_no_session_that_was_being_opened(publisher: BodyPublisher) -> None:
    endpoint = SessionEndpoint(publisher.service, "clinic")
    take = publisher.service.open_session

    def leave_meanwhile(*args: Any, **more: Any) -> str:
        name = take(*args, **more)
        endpoint.close()
        return name

    publisher.service.open_session = leave_meanwhile  # type: ignore[method-assign]
    with pytest.raises(SessionClosed):
        endpoint.handle(OPEN)
    assert publisher.service.num_sessions == 0
