import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from gaisnet.engines.nvflare.exchange import (
    REFUSED,
    TOPIC_ANSWER,
    TOPIC_KNOWN,
    TOPIC_REQUEST,
    Answers,
    Fields,
    Requests,
    send_timeout_s,
)
from gaisnet.errors import ConfigError, LinkLost, MessageTooLarge, PeerError, SiteRefused
from tests.engines.nvflare.sites import until


class Ends:
    """Both ends in one process; ``lose`` says which messages, counted from 0, or replies are lost."""

    def __init__(self, send: Callable[[bytes], Future[bytes]]) -> None:
        self.lost_messages: set[int] = set()
        self.lost_replies: set[int] = set()
        self.sent: list[str] = []
        self.requests = Requests("edge", self._to_edge, ask_again_s=0.05)
        self._send = send
        self.answers = self.start_edge()

    def start_edge(self) -> Answers:
        self.answers = Answers(self._send, self._to_cloud)
        self.answers.start()
        return self.answers

    def close(self) -> None:
        self.requests.close()
        self.answers.close()

    def _to_edge(self, topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        take = {TOPIC_REQUEST: self.answers.take_request, TOPIC_KNOWN: self.answers.is_known}[topic]
        return self._carry(topic, lambda: take(fields))

    def _to_cloud(self, topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        assert topic == TOPIC_ANSWER
        return self._carry(topic, lambda: self.requests.take_answer(fields))

    def _carry(self, topic: str, take: Callable[[], Fields]) -> Fields | None:
        number = len(self.sent)
        self.sent.append(topic)
        if number in self.lost_messages:
            return None
        reply = take()
        return None if number in self.lost_replies else reply


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as open_until_the_end:
        yield open_until_the_end


def resident(calls: list[bytes]) -> Callable[[bytes], Future[bytes]]:
    def send(payload: bytes) -> Future[bytes]:
        calls.append(payload)
        future: Future[bytes] = Future()
        future.set_result(payload[::-1])
        return future

    return send


def failing(error: Exception) -> Callable[[bytes], Future[bytes]]:
    def send(payload: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        future.set_exception(error)
        return future

    return send


def asked(ends: Ends, stack: ExitStack, payload: bytes = b"abc") -> Future[bytes]:
    pool = stack.enter_context(ThreadPoolExecutor(1))
    stack.callback(ends.close)
    return pool.submit(ends.requests.ask, payload)


def test_an_answer_comes_back(stack: ExitStack) -> None:
    calls: list[bytes] = []
    ends = Ends(resident(calls))
    assert asked(ends, stack).result(5) == b"cba"
    assert asked(ends, stack, b"").result(5) == b""
    assert calls == [b"abc", b""]


@pytest.mark.parametrize("lost_messages", [{0}, {1}, {0, 1, 2}, {0, 2, 4}])
@pytest.mark.parametrize("lost_replies", [set(), {0}, {1}, {1, 3}])
def test_what_is_lost_is_sent_again_and_carried_out_once(
    stack: ExitStack, lost_messages: set[int], lost_replies: set[int]
) -> None:
    calls: list[bytes] = []
    ends = Ends(resident(calls))
    ends.lost_messages, ends.lost_replies = lost_messages, lost_replies
    assert asked(ends, stack).result(20) == b"cba"
    assert calls == [b"abc"]


def test_a_slow_request_is_asked_after_but_not_sent_again(stack: ExitStack) -> None:
    slow: Future[bytes] = Future()
    ends = Ends(lambda payload: slow)
    answer = asked(ends, stack)
    assert until(lambda: ends.sent.count(TOPIC_KNOWN) >= 3, 5)
    slow.set_result(b"done")
    assert answer.result(5) == b"done"
    assert ends.sent.count(TOPIC_REQUEST) == 1


def test_a_request_is_sent_again_to_a_new_life_of_the_other_end(stack: ExitStack) -> None:
    calls: list[bytes] = []
    futures: list[Future[bytes]] = [Future(), Future()]

    def send(payload: bytes) -> Future[bytes]:
        calls.append(payload)
        return futures[len(calls) - 1]

    ends = Ends(send)
    answer = asked(ends, stack)
    assert until(lambda: len(calls) == 1, 5)
    ends.answers.close()
    ends.start_edge()
    assert until(lambda: len(calls) == 2, 5)
    futures[1].set_result(b"second")
    assert answer.result(5) == b"second"
    # The first life's answer is too late, and ends nobody.
    futures[0].set_result(b"first")


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (PeerError("edge", "TooFewDevices", "two are away"), "TooFewDevices", "two are away"),
        (ConfigError("cycles", "is 0", "use 1"), "ConfigError", "cycles: is 0; use 1"),
        (ZeroDivisionError("secret"), "InternalError", "see the log of the edge's NVFlare client"),
    ],
)
def test_a_failure_keeps_its_kind_and_text(stack: ExitStack, error: Exception, kind: str, text: str) -> None:
    ends = Ends(failing(error))
    with pytest.raises(PeerError) as caught:
        asked(ends, stack).result(5)
    assert (caught.value.peer_name, caught.value.kind, caught.value.text) == ("edge", kind, text)
    assert "secret" not in str(caught.value)


def test_a_request_that_the_link_does_not_take_fails(stack: ExitStack) -> None:
    def send(payload: bytes) -> Future[bytes]:
        raise MessageTooLarge("edge", len(payload), 1)

    with pytest.raises(PeerError) as caught:
        asked(Ends(send), stack).result(5)
    assert caught.value.kind == "MessageTooLarge"


def test_a_cancelled_request_fails(stack: ExitStack) -> None:
    cancelled: Future[bytes] = Future()
    ends = Ends(lambda payload: cancelled)
    answer = asked(ends, stack)
    assert until(lambda: ends.sent != [], 5)
    cancelled.cancel()
    with pytest.raises(PeerError):
        answer.result(5)


def test_close_ends_a_wait_at_once(stack: ExitStack) -> None:
    ends = Ends(lambda payload: Future())
    answer = asked(ends, stack)
    assert until(lambda: ends.sent != [], 5)
    began = time.monotonic()
    ends.close()
    with pytest.raises(LinkLost, match="'edge' is lost: the job that carried it ended"):
        answer.result(5)
    assert time.monotonic() - began < 1


def test_close_ends_a_wait_for_a_peer_that_is_away(stack: ExitStack) -> None:
    ends = Ends(lambda payload: Future())
    ends.lost_messages = set(range(1000))
    answer = asked(ends, stack)
    ends.close()
    with pytest.raises(LinkLost):
        answer.result(5)
    with pytest.raises(LinkLost):
        ends.requests.ask(b"later")


def test_an_answer_that_nobody_asked_for_is_acknowledged_and_dropped() -> None:
    requests = Requests("edge", lambda topic, fields, timeout_s: None)
    assert requests.take_answer({"id": "unknown", "payload": b"x"}) == {"ok": "yes"}
    assert requests.take_answer({}) == {"ok": "yes"}


@pytest.mark.parametrize("fields", [{}, {"id": "a"}, {"id": 1, "payload": b""}, {"id": "a", "payload": "text"}])
def test_a_malformed_request_is_refused(fields: dict[str, object]) -> None:
    answers = Answers(lambda payload: Future(), lambda topic, fields, timeout_s: None)
    assert answers.take_request(fields) == {"ok": "no"}
    assert answers.is_known(fields) == {"ok": "no"}


def test_a_peer_that_does_not_take_us_for_who_we_are_is_not_asked_again() -> None:
    sent: list[str] = []

    def post(topic: str, fields: Fields, timeout_s: float) -> Fields:
        sent.append(topic)
        return REFUSED

    with pytest.raises(SiteRefused, match="a request to 'edge': it holds another seal than the cloud"):
        Requests("edge", post).ask(b"")
    assert sent == [TOPIC_REQUEST]


def test_a_peer_that_comes_back_with_another_seal_ends_the_wait() -> None:
    replies: dict[str, list[Fields]] = {TOPIC_REQUEST: [{"ok": "yes"}, REFUSED], TOPIC_KNOWN: [REFUSED]}
    with pytest.raises(SiteRefused):
        Requests("edge", lambda topic, fields, timeout_s: replies[topic].pop(0), ask_again_s=0.01).ask(b"")


def test_taking_a_request_does_not_wait_for_the_resident() -> None:
    held = threading.Event()

    def send(payload: bytes) -> Future[bytes]:
        held.wait(5)
        return Future()

    answers = Answers(send, lambda topic, fields, timeout_s: None)
    answers.start()
    assert answers.take_request({"id": "a", "payload": b""}) == {"ok": "yes"}
    assert answers.is_known({"id": "a"}) == {"ok": "yes"}
    held.set()
    answers.close()


def test_the_deadline_of_a_message_grows_with_its_size() -> None:
    assert send_timeout_s(b"") == 5
    assert send_timeout_s(bytes(2_000_000)) == 15
