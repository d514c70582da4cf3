"""The two classes that NVFlare runs in its job processes: they carry requests of the cloud to the edges.

Neither knows what it carries. The resident processes of both hosts, which hold the models, listen; the bridges dial
them and so live and die as they like:

    gaisnet cloud <- Dialer - CloudBridge <- NVFlare -> EdgeBridge - Dialer -> gaisnet edge

No torch here, nor in anything that is imported: NVFlare fails the whole job when one of its processes dies, so that
these must stay too small to die.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal

from gaisnet.engines.nvflare.exchange import (
    TOPIC_ANSWER,
    TOPIC_KNOWN,
    TOPIC_REQUEST,
    Answers,
    Fields,
    Requests,
    Take,
)
from gaisnet.engines.nvflare.kit import ORDERS, Kit, read_kit, read_seal
from gaisnet.engines.nvflare.seal import Guard, Seal, SealedPost
from gaisnet.errors import LinkLost, UnexpectedMessage
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.dialer import Dialer

_TICK_S = 0.1
_HANG_UP_S = 0.5
_CLOSE_S = 5.0
_FIELDS = "fields"


class CloudBridge(Controller):  # type: ignore[misc]
    """Runs on the cloud's host. Asks edge after edge on behalf of the cloud's resident process.

    Args:
        edges: Names of the edges.
    """

    def __init__(self, edges: list[str]) -> None:
        super().__init__()
        self._edges = edges
        self._requests: dict[str, Requests] = {}
        self._take_from: dict[str, Take] = {}
        self._dialers: list[Dialer] = []

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Dial the resident process once per edge."""
        # NVFlare only logs what is raised here, and the job would run on deaf.
        try:
            self._start(fl_ctx)
        except Exception as error:
            self.system_panic(f"the cloud's bridge cannot start: {error!r}", fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Last until the job is aborted: it has no end of its own."""
        never = threading.Event()
        while not abort_signal.triggered:
            never.wait(_TICK_S)
        self._close()

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Close every link."""
        self._close()

    def process_result_of_unknown_task(self, *args: Any, **kwargs: Any) -> None:
        """No tasks are given."""

    def _start(self, fl_ctx: FLContext) -> None:
        engine, kit = fl_ctx.get_engine(), _kit(fl_ctx)
        self._check_all_are_in(engine)
        for edge in self._edges:
            seal = _seal(fl_ctx, edge)
            self._requests[edge] = requests = Requests(edge, SealedPost(_Aux(engine, [edge]), seal))
            self._take_from[edge] = Guard(TOPIC_ANSWER, requests.take_answer, seal)
        engine.register_aux_message_handler(TOPIC_ANSWER, self._take_answer)
        self._dialers = [_dial(kit, _asking(requests), ORDERS + edge) for edge, requests in self._requests.items()]

    def _check_all_are_in(self, engine: Any) -> None:
        """Raise ``LinkLost`` unless the job began at every edge, so that it is submitted again.

        NVFlare begins a job without an edge whose process dies while the job is being handed out, and never admits
        that edge, which is back a second later.
        """
        missing = sorted(set(self._edges) - {client.name for client in engine.get_clients()})
        if missing:
            raise LinkLost(", ".join(missing), "the job began without it")

    def _take_answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        # The name is what the sender says; the seal is what proves it.
        peer = fl_ctx.get_peer_context()
        take = self._take_from.get(peer.get_identity_name() if peer else "")
        return _reply(take, request) if take else make_reply(ReturnCode.BAD_PEER_CONTEXT)

    def _close(self) -> None:
        for requests in self._requests.values():
            requests.close()
        # All at once: each may take seconds, and none should keep the others from hanging up.
        closing = [threading.Thread(target=dialer.close, daemon=True) for dialer in self._dialers]
        self._dialers = []
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(_CLOSE_S)


class EdgeBridge(Executor):  # type: ignore[misc]
    """Runs on an edge's host. Passes requests on to the edge's resident process."""

    def __init__(self) -> None:
        super().__init__()
        self._dialer: Dialer | None = None
        self._answers: Answers | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Called by NVFlare when the job starts and ends."""
        if event_type == EventType.START_RUN:
            # See CloudBridge.start_controller.
            try:
                self._start(fl_ctx)
            except Exception as error:
                self.system_panic(f"the edge's bridge cannot start: {error!r}", fl_ctx)
        elif event_type in (EventType.ABORT_TASK, EventType.END_RUN):
            self._close()

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """No tasks are given."""
        return make_reply(ReturnCode.TASK_UNKNOWN)

    def _start(self, fl_ctx: FLContext) -> None:
        engine, kit = fl_ctx.get_engine(), _kit(fl_ctx)
        seal = _seal(fl_ctx, kit.site)
        self._dialer = dialer = _dial(kit, _refuse)
        self._answers = answers = Answers(dialer.send, SealedPost(_Aux(engine, []), seal))
        answers.start()
        for topic, take in ((TOPIC_REQUEST, answers.take_request), (TOPIC_KNOWN, answers.is_known)):
            engine.register_aux_message_handler(topic, _handler(Guard(topic, take, seal)))

    def _close(self) -> None:
        if self._answers is not None:
            self._answers.close()
        if self._dialer is not None:
            self._dialer.close()
        self._answers = self._dialer = None


class _Aux:
    """A ``Post`` over NVFlare's aux messages. No targets means the server."""

    def __init__(self, engine: Any, targets: list[str]) -> None:
        self._engine = engine
        self._targets = targets

    def __call__(self, topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        request = Shareable()
        request[_FIELDS] = fields
        # optional: a peer that is away is no error, and would fill the log. Early messages and those to a site that is
        # starting again come back with TOPIC_UNKNOWN.
        with self._engine.new_context() as fl_ctx:
            replies = self._engine.send_aux_request(self._targets, topic, request, timeout_s, fl_ctx, optional=True)
        for reply in (replies or {}).values():
            if reply.get_return_code() == ReturnCode.OK and isinstance(reply.get(_FIELDS), dict):
                found: Fields = reply[_FIELDS]
                return found
        return None


def _handler(take: Take) -> Callable[[str, Shareable, FLContext], Shareable]:
    def handle(topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        return _reply(take, request)

    return handle


def _reply(take: Take, request: Shareable) -> Shareable:
    fields = request.get(_FIELDS)
    if not isinstance(fields, dict):
        return make_reply(ReturnCode.BAD_REQUEST_DATA)
    reply = make_reply(ReturnCode.OK)
    reply[_FIELDS] = take(fields)
    return reply


def _folder(fl_ctx: FLContext) -> Path:
    startup: str = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT).get_startup_kit_dir()
    return Path(startup).parent


def _kit(fl_ctx: FLContext) -> Kit:
    return read_kit(_folder(fl_ctx))


def _seal(fl_ctx: FLContext, edge: str) -> Seal:
    return Seal(read_seal(_folder(fl_ctx), edge), edge, fl_ctx.get_job_id())


def _dial(kit: Kit, handle: Callable[[bytes], bytes], speaks_for: str | None = None) -> Dialer:
    """Return a link to the resident process of this host, under the name of its site."""
    certificates = Certificates(kit.root, kit.certificate, kit.key)
    address = f"localhost:{kit.link_port}"
    return Dialer(address, certificates, kit.site, kit.site, lambda _, payload: handle(payload), speaks_for=speaks_for)


def _asking(requests: Requests) -> Callable[[bytes], bytes]:
    """Return a dialer's handler. The link passes class and text of its errors to the other end."""

    def ask(payload: bytes) -> bytes:
        try:
            return requests.ask(payload)
        except LinkLost:
            # The link is about to be closed, so that its other end learns of the loss where it looks for it, as
            # ``LinkLost`` when the next job dials; as a failure of this request it would look like one of the edge.
            threading.Event().wait(_HANG_UP_S)
            raise

    return ask


def _refuse(payload: bytes) -> bytes:
    """Refuse a request: an edge's resident process has nothing to ask of NVFlare."""
    raise UnexpectedMessage("the edge's bridge", "request")
