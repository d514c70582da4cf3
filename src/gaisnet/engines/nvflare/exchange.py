"""Long requests over messages that are lost, repeated, and must be short.

``Requests`` is the asking end and ``Answers`` the answering one; between them are three topics. A request is sent
until it is acknowledged, and so is its reply. The asking end checks now and then whether its request is still known: if
the answering process was restarted, it is not, and the request is sent again. Within the lifetimes of both
processes a request is executed once.

Knows neither NVFlare nor torch.
"""

import logging
import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from gaisnet.errors import GaisnetError, LinkLost, PeerError, SiteRefused

TOPIC_REQUEST = "gaisnet.request"
TOPIC_KNOWN = "gaisnet.known"
TOPIC_ANSWER = "gaisnet.answer"

Fields = dict[str, bytes | str]
"""Fields of one message; a positive reply contains ``ok``."""

Take = Callable[[Mapping[str, object]], Fields]
"""Handles a message of any sender; returns the reply."""

REFUSED: Fields = {"ok": "refused"}
"""Reply to a message from a sender that may not send it."""

_YES: Fields = {"ok": "yes"}
_NO: Fields = {"ok": "no"}
_ASK_AGAIN_S = 5.0
_RETRY_S = 0.5
_SHORT_S = 5.0
_SLOWEST_BYTES_PER_S = 200_000
_REMEMBERED = 2**16
_logger = logging.getLogger(__name__)


class Post(Protocol):
    """Sends one message and waits for its reply."""

    def __call__(self, topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        """Send, and return the reply; None if the other end is away, not ready, or too slow."""


class Requests:
    """The asking end for one peer.

    Args:
        peer: Name of the answering end.
        post: Carries messages to it.
        ask_again_s: Seconds between checks of an unanswered request.
    """

    def __init__(self, peer: str, post: Post, ask_again_s: float = _ASK_AGAIN_S) -> None:
        self._peer = peer
        self._post = post
        self._ask_again_s = ask_again_s
        self._open: dict[str, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def ask(self, payload: bytes) -> bytes:
        """Wait for the reply to ``payload``, however long it takes.

        Raises:
            PeerError: The other end could not answer.
            SiteRefused: It does not accept this end's identity.
            LinkLost: ``close`` was called.
        """
        key = uuid.uuid4().hex
        answer: Future[bytes] = Future()
        with self._lock:
            self._open[key] = answer
        try:
            known = False
            while not self._ended.is_set():
                known = known or self._deliver(key, payload)
                if not known:
                    self._ended.wait(_RETRY_S)
                    continue
                try:
                    return answer.result(self._ask_again_s)
                except TimeoutError:
                    known = self._is_known(key)
        finally:
            with self._lock:
                del self._open[key]
        raise self._lost()

    def take_answer(self, fields: Mapping[str, object]) -> Fields:
        """Handle a message of ``TOPIC_ANSWER``. A repeated or unasked one is acknowledged and dropped."""
        payload, kind, text = fields.get("payload"), fields.get("kind"), fields.get("text")
        with self._lock:
            answer = self._open.get(str(fields.get("id")))
            if answer is None or answer.done():
                pass
            elif isinstance(payload, bytes):
                answer.set_result(payload)
            else:
                answer.set_exception(PeerError(self._peer, str(kind), str(text)))
        return _YES

    def close(self) -> None:
        """End every ``ask`` with ``LinkLost``."""
        self._ended.set()
        with self._lock:
            for answer in self._open.values():
                if not answer.done():
                    answer.set_exception(self._lost())

    def _lost(self) -> LinkLost:
        return LinkLost(self._peer, "the job that carried it ended")

    def _deliver(self, key: str, payload: bytes) -> bool:
        reply = self._post(TOPIC_REQUEST, {"id": key, "payload": payload}, send_timeout_s(payload))
        if reply == REFUSED:
            raise SiteRefused(f"a request to '{self._peer}'", "it holds another seal than the cloud")
        return reply == _YES

    def _is_known(self, key: str) -> bool:
        """Return whether the request is known; without a reply, assume that it is."""
        return self._post(TOPIC_KNOWN, {"id": key}, _SHORT_S) in (None, _YES)


class Answers:
    """The answering end. Its thread runs from ``start`` to ``close``.

    Args:
        send: Passes a request on; its future may take any time.
        post: Carries replies back.
    """

    def __init__(self, send: Callable[[bytes], Future[bytes]], post: Post) -> None:
        self._send = send
        self._post = post
        self._known: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)

    def start(self) -> None:
        """Begin to work on accepted requests."""
        self._thread.start()

    def take_request(self, fields: Mapping[str, object]) -> Fields:
        """Handle a message of ``TOPIC_REQUEST``: queue and acknowledge it; a repeated one is only acknowledged."""
        key, payload = fields.get("id"), fields.get("payload")
        if not isinstance(key, str) or not isinstance(payload, bytes):
            return _NO
        with self._lock:
            if key in self._known:
                return _YES
            self._known[key] = None
            while len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        self._inbox.put(lambda: self._pass_on(key, payload))
        return _YES

    def is_known(self, fields: Mapping[str, object]) -> Fields:
        """Handle a message of ``TOPIC_KNOWN``."""
        with self._lock:
            return _YES if fields.get("id") in self._known else _NO

    def close(self) -> None:
        """End the thread; unanswered requests stay so."""
        self._ended.set()
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(_SHORT_S)

    def _work(self) -> None:
        while (task := self._inbox.get()) is not None and not self._ended.is_set():
            task()

    def _pass_on(self, key: str, payload: bytes) -> None:
        try:
            future = self._send(payload)
        except GaisnetError as error:
            self._give_back({"id": key, **_failure(error)})
            return
        # The callback runs in the thread that reads the link, which must not wait.
        future.add_done_callback(lambda done: self._inbox.put(lambda: self._give_back({"id": key, **_outcome(done)})))

    def _give_back(self, fields: Fields) -> None:
        payload = fields.get("payload", b"")
        timeout_s = send_timeout_s(payload if isinstance(payload, bytes) else b"")
        while not self._ended.is_set() and self._post(TOPIC_ANSWER, fields, timeout_s) != _YES:
            self._ended.wait(_RETRY_S)


def send_timeout_s(payload: bytes) -> float:
    """Return the deadline of one message: generous enough for a line of 1.6 Mbit/s."""
    return _SHORT_S + len(payload) / _SLOWEST_BYTES_PER_S


def _outcome(done: Future[bytes]) -> Fields:
    try:
        return {"payload": done.result()}
    except GaisnetError as error:
        return _failure(error)
    except Exception as error:  # no content of a future, not even a cancellation, may end the thread
        _logger.error("a request failed in an unforeseen way: %r", error)
        return {"kind": "InternalError", "text": "see the log of the edge's NVFlare client"}


def _failure(error: GaisnetError) -> Fields:
    """Return a failure; one that the other end reported keeps its kind and text."""
    if isinstance(error, PeerError):
        return {"kind": error.kind, "text": error.text}
    return {"kind": type(error).__name__, "text": str(error)}
