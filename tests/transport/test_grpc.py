"""Links over real sockets with mutual TLS: they answer, survive drops and restarts, and refuse what they must."""

import contextlib
import gzip
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
import torch

from gaisnet.config import WireSettings
from gaisnet.errors import (
    AskedTooOften,
    ConfigError,
    CutError,
    LinkLost,
    LinkTimeout,
    MessageTooLarge,
    PeerError,
)
from gaisnet.messages import ChunkRequest, Message, ModelRelease, ModelRequest
from gaisnet.transport.admission import Rate
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, coded
from gaisnet.transport.endpoint import ByteHandler
from gaisnet.transport.frames import Frame, Kind, decode_frame, encode_frame
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.dialer import Dialer
from gaisnet.transport.grpc.listener import Listener
from gaisnet.transport.grpc.status import ask_status
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.stream import Limits
from tests.transport.certificates import Authority
from tests.transport.proxy import Proxy

DEADLINE_S = 30.0
SMALL = Limits(part_bytes=2**16, max_message_bytes=2**20, max_requests=8)
MIB = 2**20


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.dialer._BACKOFF_S", (0.02, 0.2))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def echo(_asker: str, payload: bytes) -> bytes:
    return payload


def until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.005)


class Sites:
    """Makes listeners and dialers of one network, and closes them."""

    def __init__(self, authority: Authority, stack: ExitStack) -> None:
        self.authority = authority
        self.stack = stack

    def listener(self, *accepts: str, handle: ByteHandler = echo, port: int = 0, **more: Any) -> Listener:
        certificates = self.authority.site("edge")
        listener = Listener(f"localhost:{port}", certificates, "edge", accepts, handle, **more)
        self.stack.callback(listener.close)
        return listener

    def dialer(self, port: int, name: str, handle: ByteHandler = echo, **more: Any) -> Dialer:
        listener = more.pop("listener", "edge")
        certificates = more.pop("certificates", None) or self.authority.site(name)
        dialer = Dialer(f"localhost:{port}", certificates, name, listener, handle, **more)
        self.stack.callback(dialer.close)
        return dialer

    def proxy(self, port: int) -> Proxy:
        proxy = Proxy(port)
        self.stack.callback(proxy.close)
        return proxy

    def channel(self, port: int, name: str) -> grpc.Channel:
        root, certificate, key = self.authority.site(name).read()
        options = [("grpc.ssl_target_name_override", "edge"), ("grpc.use_local_subchannel_pool", 1)]
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        return self.stack.enter_context(grpc.secure_channel(f"localhost:{port}", credentials, options))

    def raw(self, port: int, name: str) -> "RawDialer":
        raw = RawDialer(port, self.authority.site(name))
        self.stack.callback(raw.close)
        return raw


@pytest.fixture
def sites(authority: Authority) -> Iterator[Sites]:
    with ExitStack() as stack:
        yield Sites(authority, stack)


class RawDialer:
    """A client of grpcio that sends what it is told, whether that is a frame or not."""

    def __init__(self, port: int, certificates: Certificates, compression: grpc.Compression | None = None) -> None:
        root, certificate, key = certificates.read()
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        options = [
            ("grpc.ssl_target_name_override", "edge"),
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        ]
        self._channel = grpc.secure_channel(f"localhost:{port}", credentials, options, compression)
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        self.incarnation = os.urandom(16)
        talk: Any = self._channel.stream_stream("/gaisnet.Link/Talk")
        self._call = talk(iter(self._out.get, None), timeout=DEADLINE_S)

    def send(self, frame: Frame | bytes) -> None:
        self._out.put(frame if isinstance(frame, bytes) else encode_frame(frame))

    def receive(self) -> Frame:
        return decode_frame(next(self._call), Limits())

    def greet(self) -> None:
        self.send(Frame(self.incarnation, Kind.HELLO))
        assert self.receive().kind is Kind.WELCOME

    def ends(self) -> tuple[grpc.StatusCode, str]:
        """Status with which the listener closes the stream."""
        try:
            for _ in self._call:
                pass
        except grpc.RpcError:
            pass
        return self._call.code(), self._call.details()

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self._channel.close()


class Gate:
    """A handler that waits until it may go on, and counts what it was asked."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.asked: Counter[bytes] = Counter()

    def __call__(self, _asker: str, payload: bytes) -> bytes:
        self.asked[payload] += 1
        self.entered.set()
        assert self.open.wait(DEADLINE_S)
        return b"done " + payload


def answer(future: Future[bytes]) -> bytes:
    return future.result(DEADLINE_S)


# -- asking and answering ----------------------------------------------------------------------------------------------


def test_both_ends_ask(sites: Sites) -> None:
    edge = sites.listener("clinic", handle=lambda asker, payload: f"edge to {asker}: ".encode() + payload)
    clinic = sites.dialer(edge.port, "clinic", lambda asker, payload: f"clinic to {asker}: ".encode() + payload)
    assert answer(clinic.send(b"up")) == b"edge to clinic: up"
    assert answer(edge.link("clinic").send(b"down")) == b"clinic to edge: down"
    state = edge.states()["clinic"]
    assert (state.connected, state.incarnation, state.rejected_frames) == (True, edge.link("clinic").peer, 0)
    assert state.last_seen_s is not None and 0 <= state.last_seen_s <= DEADLINE_S


def test_a_request_waits_for_the_first_connection(sites: Sites) -> None:
    edge = sites.listener("clinic")
    early = edge.link("clinic").send(b"early")
    assert edge.link("clinic").peer == ""
    clinic = sites.dialer(edge.port, "clinic")
    assert answer(early) == b"early"
    assert clinic.peer and edge.link("clinic").peer


@pytest.mark.parametrize("size", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB])
def test_payloads_of_all_sizes_cross(sites: Sites, size: int) -> None:
    edge = sites.listener("clinic")
    clinic = sites.dialer(edge.port, "clinic")
    payload = os.urandom(size)
    assert answer(clinic.send(payload)) == payload
    assert answer(edge.link("clinic").send(payload)) == payload


def test_many_ask_at_once(sites: Sites) -> None:
    edge = sites.listener("clinic", "ward", limits=SMALL)
    clinic, ward = (sites.dialer(edge.port, name, limits=SMALL) for name in ("clinic", "ward"))
    links = [clinic, ward, edge.link("clinic"), edge.link("ward")]
    payloads = [str(i).encode() * (1 + i % 7 * 5000) for i in range(100)]
    asked = [(payload, link.send(payload)) for payload in payloads for link in links]
    for payload, future in asked:
        assert answer(future) == payload


def test_requests_are_answered_in_the_order_in_which_they_were_made(sites: Sites) -> None:
    seen: list[bytes] = []
    edge = sites.listener("clinic", handle=lambda _asker, payload: seen.append(payload) or b"")  # type: ignore[func-returns-value]
    clinic = sites.dialer(edge.port, "clinic")
    payloads = [str(i).encode() for i in range(200)]
    for future in [clinic.send(payload) for payload in payloads]:
        answer(future)
    assert seen == payloads


def test_a_handler_may_ask_the_one_who_asks_it(sites: Sites) -> None:
    def back(asker: str, payload: bytes) -> bytes:
        return b"asked back: " + answer(edge.link(asker).send(payload))

    edge = sites.listener("clinic", handle=back)
    assert answer(sites.dialer(edge.port, "clinic").send(b"?")) == b"asked back: ?"


def test_what_a_handler_raises_comes_through(sites: Sites) -> None:
    def fail(_asker: str, _payload: bytes) -> bytes:
        raise CutError("cut.head", 8, "the model has 4 layers", "use 1 to 3")

    edge = sites.listener("clinic", handle=fail)
    with pytest.raises(PeerError, match="a request to 'edge' failed there with CutError: cut.head is 8") as caught:
        answer(sites.dialer(edge.port, "clinic").send(b""))
    assert (caught.value.peer_name, caught.value.kind) == ("edge", "CutError")


def test_what_a_handler_did_not_mean_to_raise_stays_there(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_asker: str, _payload: bytes) -> bytes:
        raise KeyError("a secret")

    edge = sites.listener("clinic", handle=fail)
    clinic = sites.dialer(edge.port, "clinic")
    for _ in range(3):
        with pytest.raises(PeerError) as caught:
            answer(clinic.send(b""))
        assert caught.value.kind == "InternalError" and "secret" not in str(caught.value)
    assert caplog.text.count("Traceback") == 1 and "a secret" in caplog.text


def test_payloads_above_the_limit_are_refused_where_they_are_made(sites: Sites) -> None:
    edge = sites.listener("clinic", handle=lambda _asker, _payload: bytes(MIB + 1), limits=SMALL)
    clinic = sites.dialer(edge.port, "clinic", limits=SMALL)
    with pytest.raises(MessageTooLarge, match="1048577 bytes, the limit is 1048576"):
        clinic.send(bytes(MIB + 1))
    with pytest.raises(PeerError, match="MessageTooLarge"):
        answer(clinic.send(b"?"))


def test_the_late_answer_to_a_request_that_was_given_up_is_dropped(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic", handle=gate)
    clinic = sites.dialer(edge.port, "clinic")
    given_up, waiting = clinic.send(b"1"), clinic.send(b"2")
    assert gate.entered.wait(DEADLINE_S)
    assert given_up.cancel() and given_up.cancel() and given_up.cancelled()
    assert wait([given_up], DEADLINE_S).done == {given_up}
    gate.open.set()
    assert answer(waiting) == b"done 2"
    assert gate.asked == {b"1": 1, b"2": 1}
    assert edge.states()["clinic"].rejected_frames == clinic.state().rejected_frames == 0


# -- who runs the handler ----------------------------------------------------------------------------------------------


class Threads:
    """An echo that notes in which threads it ran."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, _asker: str, payload: bytes) -> bytes:
        self.names.append(threading.current_thread().name)
        return payload


def test_the_thread_that_reads_answers_where_nothing_else_is_to_be_read(sites: Sites) -> None:
    up, down = Threads(), Threads()
    edge = sites.listener("clinic", handle=up)
    clinic = sites.dialer(edge.port, "clinic", down)
    for size in (1, MIB, 3 * MIB, 1):  # what is long is sent by the thread that writes
        assert answer(clinic.send(bytes(size))) == bytes(size)
        assert answer(edge.link("clinic").send(bytes(size))) == bytes(size)
    assert up.names[0] == "gaisnet reads clinic" and down.names[0] == "gaisnet reads edge"
    assert len(up.names) == len(down.names) == 4


def test_the_worker_answers_while_somebody_waits_for_an_answer_over_the_link(sites: Sites) -> None:
    gate, threads = Gate(), Threads()
    edge = sites.listener("clinic", handle=threads)
    clinic = sites.dialer(edge.port, "clinic", gate)
    waiting = edge.link("clinic").send(b"down")
    assert gate.entered.wait(DEADLINE_S)
    assert answer(clinic.send(b"up")) == b"up"
    assert threads.names == ["edge answers"]
    gate.open.set()
    assert answer(waiting) == b"done down"


@pytest.mark.parametrize("asks", ["clinic", "edge"])
def test_others_may_ask_over_a_link_while_its_reader_answers(sites: Sites, asks: str) -> None:
    gate = Gate()
    edge = sites.listener("clinic", handle=gate if asks == "edge" else echo)
    clinic = sites.dialer(edge.port, "clinic", gate if asks == "clinic" else echo)
    here, there = (clinic, edge.link("clinic")) if asks == "clinic" else (edge.link("clinic"), clinic)
    busy = there.send(b"busy")
    assert gate.entered.wait(DEADLINE_S)
    for _ in range(3):
        assert answer(here.send(b"meanwhile")) == b"meanwhile"
    gate.open.set()
    assert answer(busy) == b"done busy"
    assert answer(there.send(b"after")) == b"done after" and answer(here.send(b"after")) == b"after"


def test_a_site_answers_one_request_after_the_other_whoever_asks(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic", "ward", handle=gate)
    clinic, ward = (sites.dialer(edge.port, name) for name in ("clinic", "ward"))
    until(lambda: clinic.peer and ward.peer, "connections")
    first = clinic.send(b"first")
    assert gate.entered.wait(DEADLINE_S)
    others = [ward.send(b"second"), clinic.send(b"third")]
    assert answer(edge.link("ward").send(b"and the link is read")) == b"and the link is read"
    assert set(gate.asked) == {b"first"}
    gate.open.set()
    assert [answer(future) for future in [first, *others]] == [b"done first", b"done second", b"done third"]


def test_an_answer_may_come_later_and_others_are_answered_meanwhile(sites: Sites) -> None:
    later: dict[bytes, Future[bytes]] = {payload: Future() for payload in (b"1", b"2", b"3", b"4")}
    edge = sites.listener("clinic", handle=lambda _asker, payload: later.get(payload, payload))
    clinic = sites.dialer(edge.port, "clinic")
    asked = {payload: clinic.send(payload) for payload in later}
    assert answer(clinic.send(b"meanwhile")) == b"meanwhile"
    later[b"2"].set_result(b"the second")
    later[b"1"].set_exception(CutError("cut.head", 8, "the model has 4 layers", "use 1 to 3"))
    later[b"3"].cancel()
    later[b"4"].set_exception(KeyError("a secret"))
    assert answer(asked[b"2"]) == b"the second"
    kinds = {b"1": "CutError", b"3": "LinkTimeout", b"4": "InternalError"}
    for payload, kind in kinds.items():
        with pytest.raises(PeerError) as caught:
            answer(asked[payload])
        assert caught.value.kind == kind


def test_an_answer_that_comes_after_a_drop_is_sent_over_the_next_connection(sites: Sites) -> None:
    later: Future[bytes] = Future()
    edge = sites.listener("clinic", handle=lambda _asker, _payload: later)
    proxy = sites.proxy(edge.port)
    clinic = sites.dialer(proxy.port, "clinic")
    asked = clinic.send(b"?")
    until(lambda: edge.states()["clinic"].connected, "a connection")
    proxy.drop()
    later.set_result(b"late")
    assert answer(asked) == b"late"


def test_those_aside_wait_for_nobody(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic", "ward", handle=lambda a, p: gate(a, p) if a == "clinic" else p, aside=["ward"])
    clinic, ward = (sites.dialer(edge.port, name) for name in ("clinic", "ward"))
    busy = clinic.send(b"an order")
    assert gate.entered.wait(DEADLINE_S)
    assert answer(ward.send(b"a question")) == b"a question"
    gate.open.set()
    assert answer(busy) == b"done an order"


def test_a_handler_may_close_its_own_link(sites: Sites) -> None:
    closed = threading.Event()

    def close(_asker: str, _payload: bytes) -> bytes:
        closes(clinic.close)
        closed.set()
        return b""

    edge = sites.listener("clinic")
    clinic = sites.dialer(edge.port, "clinic", close)
    edge.link("clinic").send(b"?")
    assert closed.wait(DEADLINE_S)


def test_a_dialer_that_does_not_read_its_answer_holds_up_nobody(sites: Sites) -> None:
    size = 2**17  # the thread that reads sends so much itself
    edge = sites.listener("clinic", "ward", handle=lambda _asker, _payload: bytes(size))
    stuck = sites.raw(edge.port, "clinic")
    stuck.greet()
    for step in range(1, 65):
        stuck.send(Frame(stuck.incarnation, Kind.REQUEST, step))
    ward = sites.dialer(edge.port, "ward")
    for _ in range(3):
        assert len(answer(ward.send(b"?"))) == size
        assert answer(edge.link("ward").send(b"?")) == b"?"
    closes(edge.close)


def test_a_grpc_that_lets_only_one_thread_send_will_do(sites: Sites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.calls.Talk.experimental_non_blocking", False)
    edge = sites.listener("clinic")
    clinic = sites.dialer(edge.port, "clinic")
    for size in (1, 3 * MIB):
        assert answer(clinic.send(bytes(size))) == bytes(size)
        assert answer(edge.link("clinic").send(bytes(size))) == bytes(size)


# -- drops and restarts ------------------------------------------------------------------------------------------------


class Model:
    """Gives a model of which one tensor alone is longer than a message, and counts what it is asked."""

    def __init__(self) -> None:
        numbers = torch.randn(5 * MIB // 4, generator=torch.Generator().manual_seed(0))
        self.release = ModelRelease("{}", (0,), (), {"embed_tokens.weight": numbers})
        self.codec = Codec(WireSettings(max_message_bytes=SMALL.max_message_bytes))
        self.asked: list[Message] = []
        self._answer = coded(self, self.codec)

    def handle(self, message: Message) -> Message:
        return self.release

    def __call__(self, asker: str, payload: bytes) -> bytes | Future[bytes]:
        self.asked.append(self.codec.decode(payload))
        return self._answer(asker, payload)


def test_a_model_in_chunks_survives_a_drop_and_no_chunk_is_asked_for_twice(sites: Sites) -> None:
    model = Model()
    edge = sites.listener("clinic", handle=model, limits=SMALL)
    proxy = sites.proxy(edge.port)
    clinic = sites.dialer(proxy.port, "clinic", limits=SMALL)
    until(lambda: clinic.peer, "a connection")
    proxy.drop_after(3 * MIB)
    link = CodedLink(clinic, model.codec, Ledger(), "edge_cloud", "up", "edge")
    found = link.send(ModelRequest()).result(DEADLINE_S)
    assert proxy.dropped and isinstance(found, ModelRelease)
    assert torch.equal(found.tensors["embed_tokens.weight"], model.release.tensors["embed_tokens.weight"])
    assert [each.index for each in model.asked if isinstance(each, ChunkRequest)] == list(range(6))
    assert proxy.passed_bytes < 7 * MIB  # one chunk at most came twice


@pytest.mark.parametrize("asker", ["clinic", "edge"])
def test_a_request_survives_a_drop_and_is_run_once(sites: Sites, asker: str) -> None:
    gate = Gate()
    edge = sites.listener("clinic", handle=gate)
    proxy = sites.proxy(edge.port)
    clinic = sites.dialer(proxy.port, "clinic", gate)
    link = clinic if asker == "clinic" else edge.link("clinic")
    until(lambda: edge.link("clinic").peer, "a connection")
    life = edge.link("clinic").peer
    future = link.send(b"once")
    assert gate.entered.wait(DEADLINE_S)
    for _ in range(3):
        proxy.drop()
        until(lambda: not (clinic.peer and edge.link("clinic").peer), "the drop is noticed")
        until(lambda: clinic.peer and edge.link("clinic").peer, "a new connection")
    gate.open.set()
    assert answer(future) == b"done once"
    assert gate.asked == {b"once": 1} and edge.link("clinic").peer == life


def test_large_payloads_survive_drops_at_any_byte(sites: Sites) -> None:
    edge = sites.listener("clinic")
    proxy = sites.proxy(edge.port)
    clinic = sites.dialer(proxy.port, "clinic")
    payload = os.urandom(5 * MIB)
    for link in (clinic, edge.link("clinic")):
        future = link.send(payload)
        for more_bytes in (10_000, MIB, 3 * MIB, 7 * MIB):  # into the handshake, the request, and the answer
            proxy.drop_after(more_bytes)
            until(lambda future=future: proxy.dropped or future.done(), "a drop")  # type: ignore[misc]
        assert answer(future) == payload


def test_requests_of_both_ends_are_run_once_while_the_link_drops_again_and_again(sites: Sites) -> None:
    asked: Counter[bytes] = Counter()

    def count(_asker: str, payload: bytes) -> bytes:
        asked[payload] += 1
        return payload

    edge = sites.listener("clinic", handle=count, limits=SMALL)
    proxy = sites.proxy(edge.port)
    clinic = sites.dialer(proxy.port, "clinic", count, limits=SMALL)
    futures = []
    for i in range(60):
        link, name = (clinic, b"up") if i % 2 else (edge.link("clinic"), b"down")
        payload = name + str(i).encode() + bytes(i * 1000)
        futures.append((payload, link.send(payload)))
        if i % 6 == 5:
            proxy.drop_after(i * 2000)
    for payload, future in futures:
        assert answer(future) == payload
    assert len(asked) == 60 and set(asked.values()) == {1}


def test_a_dialer_that_restarts_loses_the_requests_of_the_listener(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic")
    link = edge.link("clinic")
    first = sites.dialer(edge.port, "clinic", gate)
    lost = link.send(b"lost")
    assert gate.entered.wait(DEADLINE_S)
    life = link.peer
    first.close()
    until(lambda: not link.peer, "the end of the first life")
    assert not lost.done()
    sites.dialer(edge.port, "clinic")
    with pytest.raises(LinkLost, match="it restarted and forgot the request"):
        answer(lost)
    assert answer(link.send(b"found")) == b"found" and link.peer != life
    gate.open.set()


def test_a_listener_that_restarts_is_asked_again(sites: Sites) -> None:
    gate = Gate()
    first = sites.listener("clinic", handle=gate)
    proxy = sites.proxy(first.port)
    clinic = sites.dialer(proxy.port, "clinic")
    future = clinic.send(b"?")
    assert gate.entered.wait(DEADLINE_S)
    life = clinic.peer
    first.close()
    proxy.target = sites.listener("clinic", handle=lambda _asker, payload: b"second: " + payload).port
    assert answer(future) == b"second: ?"
    assert clinic.peer not in ("", life)
    gate.open.set()


def test_a_new_connection_takes_the_place_of_one_that_nobody_has_noticed_to_be_dead(sites: Sites) -> None:
    edge = sites.listener("clinic")
    dead = sites.raw(edge.port, "clinic")
    dead.greet()
    clinic = sites.dialer(edge.port, "clinic")
    assert answer(clinic.send(b"alive")) == b"alive"
    assert dead.ends()[0] in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK)


def test_nobody_listens_yet(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    probe = sites.listener("clinic")
    probe.close()
    clinic = sites.dialer(probe.port, "clinic")
    future = clinic.send(b"patient")
    until(lambda: clinic.state().problem, "a first attempt")
    assert clinic.peer == "" and "UNAVAILABLE" in clinic.state().problem
    until(lambda: caplog.records, "a warning")
    sites.listener("clinic", port=probe.port)
    assert answer(future) == b"patient"
    assert clinic.state().problem == ""
    assert sum("link to 'edge'" in record.message for record in caplog.records) == 1


# -- who may speak -----------------------------------------------------------------------------------------------------


def is_refused(dialer: Dialer, listener: Listener, problem: str) -> None:
    waiting = dialer.send(b"?")
    until(lambda: dialer.state().problem, "an attempt")
    assert problem in dialer.state().problem
    assert not waiting.done() and not dialer.peer
    assert not any(state.connected for state in listener.states().values())


def test_a_site_of_another_network_is_refused(sites: Sites, tmp_path: Path) -> None:
    edge = sites.listener("clinic")
    other = Authority(tmp_path).site("clinic")
    theirs_with_our_root = Certificates(sites.authority.root, other.certificate, other.key)
    is_refused(sites.dialer(edge.port, "clinic", certificates=theirs_with_our_root), edge, "UNAVAILABLE")
    is_refused(sites.dialer(edge.port, "clinic", certificates=other), edge, "UNAVAILABLE")
    assert answer(sites.dialer(edge.port, "clinic").send(b"ours")) == b"ours"


def test_a_client_without_a_certificate_is_refused(sites: Sites) -> None:
    edge = sites.listener("clinic")
    credentials = grpc.ssl_channel_credentials(sites.authority.root.read_bytes())
    options = [("grpc.ssl_target_name_override", "edge"), ("grpc.enable_http_proxy", 0)]
    with grpc.secure_channel(f"localhost:{edge.port}", credentials, options) as channel:
        status: Any = channel.unary_unary("/gaisnet.Link/Status")
        with pytest.raises(grpc.RpcError) as caught:
            status(b"", timeout=DEADLINE_S)
    assert isinstance(caught.value, grpc.Call) and caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_listener_of_another_name_is_refused(sites: Sites) -> None:
    edge = sites.listener("clinic")
    is_refused(sites.dialer(edge.port, "clinic", listener="cloud"), edge, "UNAVAILABLE")


def test_a_site_that_is_not_on_the_list_is_refused_and_logged_once(
    sites: Sites, caplog: pytest.LogCaptureFixture
) -> None:
    edge = sites.listener("clinic")
    for _ in range(2):
        is_refused(
            sites.dialer(edge.port, "stranger"), edge, "PERMISSION_DENIED: 'stranger' is not on the list of 'edge'"
        )
    assert sum("nothing is said for a minute" in record.message for record in caplog.records) == 1


def test_a_site_speaks_for_another_only_to_itself(sites: Sites) -> None:
    edge = sites.listener("clinic", "ward", "cloud", handle=lambda asker, payload: asker.encode())
    engine = sites.dialer(edge.port, "edge", speaks_for="cloud")
    assert answer(engine.send(b"")) == b"cloud"
    is_refused(sites.dialer(edge.port, "edge", speaks_for="nobody"), sites.listener("x"), "'nobody' is not on the list")
    ward = sites.dialer(edge.port, "clinic", speaks_for="ward")
    until(lambda: ward.state().problem, "an attempt")
    assert "'clinic' may not speak for 'ward'" in ward.state().problem
    assert answer(sites.dialer(edge.port, "clinic", speaks_for="clinic").send(b"")) == b"clinic"


def test_a_link_to_a_site_that_is_not_on_the_list_is_an_error(sites: Sites) -> None:
    with pytest.raises(ConfigError, match="a link to 'ward': 'edge' accepts clinic"):
        sites.listener("clinic").link("ward")


def test_certificates_that_are_missing_are_named(sites: Sites, tmp_path: Path) -> None:
    missing = Certificates(sites.authority.root, tmp_path / "none.crt", tmp_path / "none.key")
    with pytest.raises(ConfigError, match=r"none\.crt.*No such file"):
        Dialer("localhost:1", missing, "clinic", "edge", echo)


def test_an_address_that_is_in_use_is_named(sites: Sites) -> None:
    edge = sites.listener("clinic")
    with pytest.raises(ConfigError, match=f"listening on 'localhost:{edge.port}'"):
        sites.listener("clinic", port=edge.port)


# -- hostile frames ----------------------------------------------------------------------------------------------------

HOSTILE: dict[str, Callable[[bytes], list[Frame | bytes]]] = {
    "nothing": lambda _life: [b""],
    "noise": lambda _life: [os.urandom(100)],
    "a header that stops early": lambda life: [encode_frame(Frame(life, Kind.REQUEST, 1))[:-1]],
    "an unknown kind": lambda life: [b"\x14\x0a\x10" + life + b"\x10\x63"],
    "a long session id": lambda life: [Frame(life + b"x", Kind.REQUEST, 1)],
    "a huge total": lambda life: [Frame(life, Kind.REQUEST, 1, 0, 2**62, 0, b"x")],
    "a part above the limit": lambda life: [Frame(life, Kind.REQUEST, 1, 0, 2**19, 0, bytes(2**16 + 1))],
    "a replay": lambda life: [Frame(life, Kind.REQUEST, 1)] * 2,
    "steps that go back": lambda life: [Frame(life, Kind.REQUEST, 2), Frame(life, Kind.REQUEST, 1)],
    "parts out of order": lambda life: [Frame(life, Kind.REQUEST, 1, part, 9, 0, b"abc") for part in (0, 2)],
    "an answer to nothing": lambda life: [Frame(life, Kind.ANSWER, 1)],
    "another session": lambda _life: [Frame(bytes(16), Kind.REQUEST, 1)],
    "a second greeting": lambda life: [Frame(life, Kind.HELLO)],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_frame_closes_its_own_link_only(sites: Sites, case: str, caplog: pytest.LogCaptureFixture) -> None:
    edge = sites.listener("clinic", "ward", limits=SMALL)
    ward = sites.dialer(edge.port, "ward", limits=SMALL)
    assert answer(ward.send(b"before")) == b"before"
    life = edge.link("ward").peer
    for _ in range(2):
        hostile = sites.raw(edge.port, "clinic")
        hostile.greet()
        for frame in HOSTILE[case](hostile.incarnation):
            hostile.send(frame)
        code, text = hostile.ends()
        assert code is grpc.StatusCode.INVALID_ARGUMENT and "cannot be read" in text
    assert answer(ward.send(b"after")) == b"after" and edge.link("ward").peer == life
    assert edge.states()["ward"].rejected_frames == 0
    assert edge.states()["clinic"].rejected_frames == 2
    assert sum("link to 'clinic'" in record.message for record in caplog.records) == 1
    clinic = sites.dialer(edge.port, "clinic", limits=SMALL)
    assert answer(clinic.send(b"well again")) == b"well again"


def test_a_message_above_the_limit_of_grpc_is_refused_by_grpc(sites: Sites) -> None:
    edge = sites.listener("clinic", "ward", limits=SMALL)
    hostile = sites.raw(edge.port, "clinic")
    hostile.greet()
    hostile.send(Frame(hostile.incarnation, Kind.REQUEST, 1, 0, 2**19, 0, bytes(2**19)))
    assert hostile.ends()[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert answer(sites.dialer(edge.port, "ward", limits=SMALL).send(b"other")) == b"other"
    assert answer(sites.dialer(edge.port, "clinic", limits=SMALL).send(b"well again")) == b"well again"


def test_a_compressed_frame_is_not_unpacked(sites: Sites) -> None:
    edge = sites.listener("clinic", limits=SMALL)
    bomb = RawDialer(edge.port, sites.authority.site("clinic"), grpc.Compression.Gzip)
    sites.stack.callback(bomb.close)
    bomb.send(Frame(bomb.incarnation, Kind.HELLO))
    bomb.send(bytes(2**24))
    assert len(gzip.compress(bytes(2**24))) < SMALL.part_bytes
    assert bomb.ends()[0] in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INVALID_ARGUMENT)
    assert not edge.states()["clinic"].connected
    assert answer(sites.dialer(edge.port, "clinic", limits=SMALL).send(b"after")) == b"after"


def test_a_dialer_that_does_not_read_holds_up_nobody(sites: Sites) -> None:
    edge = sites.listener("clinic", "ward")
    stuck = sites.raw(edge.port, "clinic")
    stuck.greet()
    waiting = edge.link("clinic").send(bytes(32 * MIB))
    ward = sites.dialer(edge.port, "ward")
    for _ in range(10):
        assert answer(ward.send(bytes(MIB))) == bytes(MIB)
        assert answer(edge.link("ward").send(b"?")) == b"?"
    stuck.send(b"noise")
    until(lambda: not edge.states()["clinic"].connected, "the stuck link is closed")
    sites.dialer(edge.port, "clinic")
    with pytest.raises(LinkLost):
        answer(waiting)


# -- one that takes too much ------------------------------------------------------------------------------------------


def test_status_calls_that_are_held_open_keep_nobody_out(sites: Sites, caplog: pytest.LogCaptureFixture) -> None:
    edge = sites.listener("clinic", "ward", status=lambda: {"ok": True})
    ward = sites.dialer(edge.port, "ward")
    assert answer(ward.send(b"before")) == b"before"
    never = threading.Event()
    sites.stack.callback(never.set)

    def nothing() -> Iterator[bytes]:
        never.wait(DEADLINE_S)
        yield from ()

    for _ in range(15):
        channel = sites.channel(edge.port, "clinic")
        status: Any = channel.stream_stream("/gaisnet.Link/Status")
        for _ in range(4):
            sites.stack.callback(status(nothing(), timeout=DEADLINE_S).cancel)
    until(lambda: caplog.records, "the listener has had too many")
    assert answer(sites.dialer(edge.port, "clinic").send(b"a stream of its own")) == b"a stream of its own"
    assert ask_status(f"localhost:{edge.port}", sites.authority.site("ward"), "edge", DEADLINE_S) == {"ok": True}
    assert answer(ward.send(b"after")) == b"after"
    assert sum("'clinic'" in record.message for record in caplog.records) == 1


def test_who_asks_for_the_status_too_often_is_told_so_and_others_are_not(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.listener._STATUSES", Rate(at_once=2, burst=3, per_s=0.0))
    edge = sites.listener("clinic", "ward", status=lambda: {"ok": True})
    at = f"localhost:{edge.port}"
    for _ in range(3):
        assert ask_status(at, sites.authority.site("clinic"), "edge", DEADLINE_S) == {"ok": True}
    with pytest.raises(AskedTooOften, match="the status of 'edge': 'clinic' makes more than"):
        ask_status(at, sites.authority.site("clinic"), "edge", DEADLINE_S)
    assert ask_status(at, sites.authority.site("ward"), "edge", DEADLINE_S) == {"ok": True}
    assert answer(sites.dialer(edge.port, "clinic").send(b"a stream of its own")) == b"a stream of its own"


def test_a_site_that_dials_again_and_again_is_refused_and_others_are_not(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.listener._STREAMS", Rate(at_once=4, burst=3, per_s=0.0))
    edge = sites.listener("clinic", "ward")
    for _ in range(3):
        sites.raw(edge.port, "clinic").greet()
    code, text = sites.raw(edge.port, "clinic").ends()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED and "'clinic' makes more than" in text
    assert answer(sites.dialer(edge.port, "ward").send(b"ward")) == b"ward"


def test_a_site_that_restarts_again_and_again_leaves_no_more_requests_than_two_lives_may_have(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic", "ward", handle=gate, limits=SMALL)
    busy = sites.dialer(edge.port, "ward", limits=SMALL).send(b"busy")
    assert gate.entered.wait(DEADLINE_S)
    for life in range(3):
        restless = sites.raw(edge.port, "clinic")
        restless.greet()
        for step in range(1, SMALL.max_requests + 1):
            restless.send(Frame(restless.incarnation, Kind.REQUEST, step))
        if life < 2:
            asked = edge._endpoints["clinic"]
            until(lambda asked=asked, life=life: asked._queued == SMALL.max_requests * (life + 1), "requests")  # type: ignore[misc]
    code, text = restless.ends()
    assert code is grpc.StatusCode.INVALID_ARGUMENT and "of earlier lives as well" in text
    gate.open.set()
    assert answer(busy) == b"done busy"
    assert answer(sites.dialer(edge.port, "clinic", limits=SMALL).send(b"well again")) == b"done well again"


def test_those_aside_have_limits_of_their_own(sites: Sites) -> None:
    tight = Limits(part_bytes=2**16, max_message_bytes=2**20, max_dialer_bytes=2**17)
    edge = sites.listener("clinic", "ward", limits=SMALL, aside=["ward"], limits_aside=tight)
    assert answer(sites.dialer(edge.port, "clinic", limits=SMALL).send(bytes(2**20))) == bytes(2**20)
    ward = sites.dialer(edge.port, "ward", limits=tight)
    assert answer(edge.link("ward").send(bytes(2**20))) == bytes(2**20)
    with pytest.raises(MessageTooLarge, match="service.max_request_mib"):
        ward.send(bytes(2**17 + 1))
    greedy = sites.raw(edge.port, "ward")
    greedy.greet()
    greedy.send(Frame(greedy.incarnation, Kind.REQUEST, 1, 0, 2**17 + 1, 0, b"x"))
    assert greedy.ends()[0] is grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.listener._HANDSHAKE_S", 0.3)
    monkeypatch.setattr("gaisnet.transport.grpc.listener._IDLE_S", 0.3)


def is_closed(one: socket.socket) -> bool:
    one.settimeout(DEADLINE_S)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while one.recv(4096):
            pass
    return True  # a TimeoutError says that it is not


def is_open(one: socket.socket) -> bool:
    try:
        return bool(one.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@pytest.mark.usefixtures("short_patience")
@pytest.mark.parametrize("shows", ["nothing", "half a greeting", "its certificate"])
def test_a_connection_that_asks_for_nothing_is_closed(sites: Sites, shows: str) -> None:
    edge = sites.listener("clinic")
    clinic = sites.dialer(edge.port, "clinic")
    assert answer(clinic.send(b"before")) == b"before"
    life = clinic.peer
    idle = sites.stack.enter_context(socket.create_connection(("localhost", edge.port)))
    if shows == "half a greeting":
        idle.sendall(b"\x16\x03\x01\x02\x00\x01")
    elif shows == "its certificate":
        idle = sites.stack.enter_context(over_tls(idle, sites.authority.site("clinic")))
        idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    assert is_closed(idle)
    assert answer(clinic.send(b"after")) == b"after" and clinic.peer == life


def over_tls(connection: socket.socket, own: Certificates) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=own.root)
    context.load_cert_chain(own.certificate, own.key)
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(connection, server_hostname="edge")


def test_idle_connections_take_no_more_descriptors_than_there_are_for_connections(
    sites: Sites, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gaisnet.transport.grpc.listener._HANDSHAKE_S", 3)
    monkeypatch.setattr("gaisnet.transport.grpc.listener._IDLE_S", 3)
    monkeypatch.setattr("gaisnet.transport.grpc.listener.room_for_connections", lambda: 10)
    edge = sites.listener("clinic")
    idle = [sites.stack.enter_context(socket.create_connection(("127.0.0.1", edge.port))) for _ in range(40)]
    until(lambda: sum(map(is_open, idle)) <= 10, "those for which there is no room are closed")
    assert any(map(is_open, idle))  # the others are closed later, because they ask for nothing
    assert answer(sites.dialer(edge.port, "clinic").send(b"honest")) == b"honest"
    assert all(map(is_closed, idle))


# -- closing -----------------------------------------------------------------------------------------------------------


def closes(close: Callable[[], None]) -> None:
    started = time.monotonic()
    close()
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("end", ["dialer", "listener"])
def test_closing_fails_what_waits_even_while_a_handler_is_busy(sites: Sites, end: str) -> None:
    gate = Gate()
    edge = sites.listener("clinic", handle=gate)
    clinic = sites.dialer(edge.port, "clinic", gate)
    up, down = clinic.send(b"up"), edge.link("clinic").send(b"down")
    until(lambda: len(gate.asked) == 2, "both handlers are busy")
    closes(clinic.close if end == "dialer" else edge.close)
    with pytest.raises(LinkLost, match="the link was closed"):
        answer(up if end == "dialer" else down)
    later = clinic.send(b"") if end == "dialer" else edge.link("clinic").send(b"")
    with pytest.raises(LinkLost, match="the link is closed"):
        answer(later)
    gate.open.set()


def test_closing_a_dialer_that_never_came_through(sites: Sites) -> None:
    probe = sites.listener("clinic")
    probe.close()
    clinic = sites.dialer(probe.port, "clinic")
    waiting = clinic.send(b"?")
    closes(clinic.close)
    assert isinstance(waiting.exception(DEADLINE_S), LinkLost)


def test_closing_leaves_no_thread(sites: Sites) -> None:
    before = set(threading.enumerate())
    edge = sites.listener("clinic")
    clinic = sites.dialer(edge.port, "clinic")
    answer(clinic.send(b"?"))
    clinic.close()
    edge.close()
    until(
        lambda: not any("gaisnet" in t.name or "answers" in t.name for t in set(threading.enumerate()) - before), "end"
    )


# -- status and many ---------------------------------------------------------------------------------------------------


def test_the_status_is_told_while_the_handler_is_busy(sites: Sites) -> None:
    gate = Gate()
    edge = sites.listener("clinic", handle=gate, status=lambda: {"cycle": 3, "site": "édge"})
    future = sites.dialer(edge.port, "clinic").send(b"busy")
    assert gate.entered.wait(DEADLINE_S)
    status = ask_status(f"localhost:{edge.port}", sites.authority.site("ward"), "edge", DEADLINE_S)
    assert status == {"cycle": 3, "site": "édge"}
    gate.open.set()
    answer(future)


def test_the_status_of_nobody(sites: Sites) -> None:
    probe = sites.listener("clinic")
    probe.close()
    with pytest.raises(LinkLost, match="a request to 'edge' is lost: UNAVAILABLE"):
        ask_status(f"localhost:{probe.port}", sites.authority.site("clinic"), "edge", DEADLINE_S)


def test_a_status_that_takes_too_long(sites: Sites) -> None:
    release = threading.Event()
    edge = sites.listener("clinic", status=lambda: {"ok": release.wait(DEADLINE_S)})
    with pytest.raises(LinkTimeout, match="the status of 'edge': no answer for 0.3 s"):
        ask_status(f"localhost:{edge.port}", sites.authority.site("clinic"), "edge", 0.3)
    release.set()


def all_at_once(sites: Sites, number: int) -> None:
    names = [f"device-{i}" for i in range(number)]
    edge = sites.listener(*names, handle=lambda asker, payload: asker.encode() + payload)
    dialers = {name: sites.dialer(edge.port, name) for name in names}
    for round_ in (b"1", b"2", b"3"):
        up = {name: dialer.send(round_) for name, dialer in dialers.items()}
        down = {name: edge.link(name).send(name.encode() + round_) for name in names}
        for name in names:
            assert answer(up[name]) == answer(down[name]) == name.encode() + round_
    assert all(state.connected for state in edge.states().values())


def test_twenty_dialers_at_once(sites: Sites) -> None:
    all_at_once(sites, 20)


@pytest.mark.slow
def test_two_hundred_dialers_at_once(sites: Sites) -> None:
    all_at_once(sites, 200)
