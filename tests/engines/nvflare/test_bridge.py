"""The bridges in this process, with residents on loopback; in place of NVFlare a few lines that deliver messages."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from gaisnet.engines.nvflare.bridge import CloudBridge, EdgeBridge
from gaisnet.engines.nvflare.exchange import TOPIC_ANSWER, TOPIC_KNOWN, TOPIC_REQUEST, Fields
from gaisnet.engines.nvflare.kit import ORDERS, SEALS, read_seal
from gaisnet.engines.nvflare.provision import provision
from gaisnet.engines.nvflare.seal import Seal
from gaisnet.errors import PeerError, TooFewDevices
from gaisnet.transport.grpc.listener import Listener
from tests.engines.nvflare.sites import EDGES, addresses, listen, until

JOB = "job-1"
Deliver = Callable[[str, Shareable, Any], Shareable]


class Network:
    """Delivers what a site sends to another one, under the name it gives itself, as NVFlare does."""

    def __init__(self, kits: dict[str, Path]) -> None:
        self.kits = kits
        self.handlers: dict[str, dict[str, Deliver]] = {site: {} for site in ("cloud", *EDGES)}
        self.delivered: list[tuple[str, str, Fields]] = []
        self.in_job = list(EDGES)

    def deliver(self, sender: str, target: str, topic: str, request: Shareable) -> Shareable:
        self.delivered.append((target, topic, request["fields"]))
        handler = self.handlers[target].get(topic)
        peer = SimpleNamespace(get_identity_name=lambda: sender)
        context = SimpleNamespace(get_peer_context=lambda: peer)
        return handler(topic, request, context) if handler else make_reply(ReturnCode.TOPIC_UNKNOWN)

    def forge(self, sender: str, target: str, topic: str, fields: Fields) -> object:
        request = Shareable()
        request["fields"] = fields
        reply = self.deliver(sender, target, topic, request)
        return reply.get("fields") or reply.get_return_code()

    def context(self, site: str) -> Any:
        workspace = SimpleNamespace(get_startup_kit_dir=lambda: str(self.kits[site] / "startup"))
        return SimpleNamespace(
            get_engine=lambda: Engine(self, site), get_prop=lambda key: workspace, get_job_id=lambda: JOB
        )


class Engine:
    """What the bridges use of NVFlare's engine."""

    def __init__(self, network: Network, site: str) -> None:
        self._network = network
        self._site = site

    def get_clients(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self._network.in_job]

    def register_aux_message_handler(self, topic: str, handler: Deliver) -> None:
        self._network.handlers[self._site][topic] = handler

    @contextmanager
    def new_context(self) -> Iterator[None]:
        yield None

    def send_aux_request(
        self, targets: list[str], topic: str, request: Shareable, timeout: float, fl_ctx: None, optional: bool
    ) -> dict[str, Shareable]:
        return {to: self._network.deliver(self._site, to, topic, request) for to in targets or ["cloud"]}


class Bridges:
    def __init__(self, network: Network, cloud: Listener, seen: dict[str, list[bytes]]) -> None:
        self.network = network
        self.seen = seen
        self._cloud = cloud

    def ask(self, edge: str, payload: bytes) -> Future[bytes]:
        return self._cloud.link(ORDERS + edge).send(payload)

    def sealed(self, holder: str, edge: str, topic: str, fields: Fields, job: str = JOB) -> Fields:
        """With the secret in the kit of ``holder``, as if it were that of ``edge``."""
        return Seal(read_seal(self.network.kits[holder], holder), edge, job).put_on(topic, fields)

    def last(self, target: str, topic: str) -> Fields:
        return [fields for to, what, fields in self.network.delivered if (to, what) == (target, topic)][-1]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return provision(addresses(), tmp_path_factory.mktemp("sites"))


HOLD = threading.Event()


def answer(payload: bytes) -> bytes:
    if payload == b"fail":
        raise TooFewDevices("edge1", 2, 1, "one is away")
    if payload == b"wait":
        HOLD.wait(10)
    return payload[::-1]


@pytest.fixture
def bridges(kits: dict[str, Path]) -> Iterator[Bridges]:
    network, seen = Network(kits), {edge: list[bytes]() for edge in EDGES}

    def resident(edge: str) -> Callable[[str, bytes], bytes]:
        def handle(_: str, payload: bytes) -> bytes:
            seen[edge].append(payload)
            return answer(payload)

        return handle

    cloud = listen(kits["cloud"], [ORDERS + edge for edge in EDGES], lambda name, payload: b"")
    edges = [listen(kits[edge], [edge], resident(edge)) for edge in EDGES]
    controller, executors = CloudBridge(list(EDGES)), {edge: EdgeBridge() for edge in EDGES}
    controller.start_controller(network.context("cloud"))
    for edge, executor in executors.items():
        executor.handle_event(EventType.START_RUN, network.context(edge))
    HOLD.clear()
    yield Bridges(network, cloud, seen)
    HOLD.set()
    for edge, executor in executors.items():
        executor.handle_event(EventType.END_RUN, network.context(edge))
    controller.stop_controller(network.context("cloud"))
    for listener in (cloud, *edges):
        listener.close()


def test_a_job_that_began_without_an_edge_ends(kits: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    network, controller, panics = Network(kits), CloudBridge(list(EDGES)), list[str]()
    network.in_job = ["edge1"]
    monkeypatch.setattr(controller, "system_panic", lambda reason, _: panics.append(reason))
    controller.start_controller(network.context("cloud"))
    controller.stop_controller(network.context("cloud"))
    assert len(panics) == 1
    assert "edge2" in panics[0] and "the job began without it" in panics[0]


def test_a_right_order_passes(bridges: Bridges) -> None:
    assert bridges.ask("edge1", b"abc").result(10) == b"cba"
    assert bridges.ask("edge2", b"xyz").result(10) == b"zyx"
    assert bridges.seen == {"edge1": [b"abc"], "edge2": [b"xyz"]}


def test_the_cloud_sees_what_the_edge_raised(bridges: Bridges) -> None:
    with pytest.raises(PeerError) as caught:
        bridges.ask("edge1", b"fail").result(10)
    assert caught.value.kind == "TooFewDevices"
    assert caught.value.text == str(TooFewDevices("edge1", 2, 1, "one is away"))


def test_a_forged_order_is_dropped_and_the_edge_goes_on(bridges: Bridges, caplog: pytest.LogCaptureFixture) -> None:
    order: Fields = {"id": "f", "payload": b"forged"}
    forged = [
        order,
        {**order, "seal": bytes(32)},
        bridges.sealed("edge2", "edge2", TOPIC_REQUEST, order),
        bridges.sealed("edge2", "edge1", TOPIC_REQUEST, order),
        bridges.sealed("edge1", "edge1", TOPIC_REQUEST, order, job="an earlier job"),
        bridges.sealed("edge1", "edge1", TOPIC_ANSWER, order),
    ]
    with caplog.at_level(logging.DEBUG):
        for sender in ("edge2", "cloud"):
            for fields in forged:
                assert bridges.network.forge(sender, "edge1", TOPIC_REQUEST, fields) == {"ok": "refused"}
        assert bridges.network.forge("edge2", "edge1", TOPIC_KNOWN, {"id": "f"}) == {"ok": "refused"}
        assert bridges.ask("edge1", b"right").result(10) == b"thgir"
    assert bridges.seen["edge1"] == [b"right"]
    assert len([line for line in caplog.messages if "dropped a gaisnet.request" in line]) == 1
    secrets = [read_seal(bridges.network.kits[edge], edge) for edge in EDGES]
    assert not any(secret.hex() in caplog.text or repr(secret) in caplog.text for secret in secrets)


def test_a_replayed_order_is_not_carried_out_again(bridges: Bridges) -> None:
    assert bridges.ask("edge1", b"once").result(10) == b"ecno"
    order = bridges.last("edge1", TOPIC_REQUEST)
    assert bridges.network.forge("edge2", "edge1", TOPIC_REQUEST, order) == {"ok": "yes"}
    assert bridges.ask("edge1", b"next").result(10) == b"txen"
    assert bridges.seen["edge1"] == [b"once", b"next"]


@pytest.mark.parametrize("sender", EDGES)
def test_another_edge_cannot_answer(bridges: Bridges, sender: str) -> None:
    asked = bridges.ask("edge1", b"wait")
    assert until(lambda: bridges.seen["edge1"] == [b"wait"], 10)
    answer: Fields = {"id": bridges.last("edge1", TOPIC_REQUEST)["id"], "payload": b"forged"}
    bridges.network.forge(sender, "cloud", TOPIC_ANSWER, answer)
    for edge in EDGES:
        bridges.network.forge(sender, "cloud", TOPIC_ANSWER, bridges.sealed("edge2", edge, TOPIC_ANSWER, answer))
    HOLD.set()
    assert asked.result(10) == b"tiaw"


def test_an_answer_of_nobody_is_refused(bridges: Bridges) -> None:
    found = bridges.network.forge("edge3", "cloud", TOPIC_ANSWER, {"id": "a", "payload": b""})
    assert found == ReturnCode.BAD_PEER_CONTEXT


def test_kits_of_two_makings_are_told_apart(kits: dict[str, Path], bridges: Bridges) -> None:
    file = kits["edge1"] / SEALS / "edge1"
    right = file.read_text(encoding="ascii")
    again = EdgeBridge()
    try:
        file.write_text("00" * 32, encoding="ascii")
        again.handle_event(EventType.START_RUN, bridges.network.context("edge1"))
        with pytest.raises(PeerError, match="holds another seal than the cloud") as caught:
            bridges.ask("edge1", b"abc").result(10)
        assert caught.value.kind == "SiteRefused"
    finally:
        file.write_text(right, encoding="ascii")
        again.handle_event(EventType.END_RUN, bridges.network.context("edge1"))
