"""Links over gRPC: one site listens, others dial it, and each dialer keeps one bidirectional stream.

Both ends show certificates of the same network (mutual TLS). The listener takes a dialer's name from its certificate
and refuses every name that is not on its list. A dialer refuses a listener of another name. Messages are raw bytes to
gRPC; what is in them is up to ``endpoint`` and ``session``. All of the grpc library is used here and nowhere else.
"""

import contextlib
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

import grpc
from pydantic import JsonValue

from gaisnet.errors import ConfigError, LinkLost, LinkTimeout, SiteRefused, WireFormatError
from gaisnet.transport.endpoint import ByteHandler, Connection, Endpoint
from gaisnet.transport.frames import LIFE_BYTES
from gaisnet.transport.stream import DEFAULT_LIMITS, ByteLink, Limits, LinkState
from gaisnet.transport.worker import Worker

_SERVICE = "gaisnet.Link"
_TALK, _STATUS = "Talk", "Status"
_SPEAKS_FOR = "gaisnet-speaks-for-bin"
_CLOSE_S = 2.0  # for each of the two things that closing waits for
_STUCK_S = 1.0
_WELCOME_S = 15.0
_BACKOFF_S = (0.2, 5.0)  # first and longest
_SETTLED_S = 5.0  # a connection that stood for so long was a good one
_SPARE_CALLS = 16
_FRAME_SLACK_BYTES = 2**16
_Send = Callable[[bytes | None], None]  # waits until the frame is on its way; None ends the call
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """PEM files of one site.

    Attributes:
        root: Certificate of the network's authority.
        certificate: The site's own; its common name is the site's name, and so is a subject alternative name.
        key: Private key to it.
    """

    root: Path
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of the three files. Raises ``ConfigError``."""
        return _read(self.root), _read(self.certificate), _read(self.key)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(f"certificate file '{file}'", found, "prepare the kit of this site again") from error


class Listener:
    """A server that others dial.

    Args:
        address: ``host:port``; port 0 takes a free one.
        certificates: Of this site.
        name: Of this site. A dialer that shows a certificate of this same name may speak for others.
        accepts: Names that may dial.
        handle: Answers requests, one after the other, in the order in which they came, each in any thread. It may ask
            over all links.
        limits: What dialers may send.
        status: Answers ``ask_status``, in threads of gRPC; must not wait for anything.
        aside: Those of ``accepts`` whose requests do not wait for requests of the others, nor the other way round.

    Raises:
        ConfigError: The certificates cannot be read, or the address cannot be listened on.
    """

    def __init__(
        self,
        address: str,
        certificates: Certificates,
        name: str,
        accepts: Collection[str],
        handle: ByteHandler,
        limits: Limits = DEFAULT_LIMITS,
        status: Callable[[], Mapping[str, JsonValue]] = dict,
        aside: Collection[str] = (),
    ) -> None:
        self._name = name
        self._status = status
        self._workers = {apart: Worker(f"{name} answers") for apart in (False, True)}
        life = os.urandom(LIFE_BYTES)
        self._endpoints = {
            other: Endpoint(other, life, limits, handle, self._workers[other in aside], dials=False)
            for other in accepts
        }
        self._lock = threading.Lock()
        self._calls: dict[str, grpc.ServicerContext] = {}
        self._refused: set[str] = set()
        self._server = self._serve(limits)
        self.port = self._listen(address, certificates)
        self._server.start()

    def link(self, name: str) -> ByteLink:
        """The link to an accepted name, whether it has dialled or not. Raises ``ConfigError`` for another name."""
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            accepts = ", ".join(sorted(self._endpoints)) or "nobody"
            raise ConfigError(f"a link to '{name}'", f"'{self._name}' accepts {accepts}", "list the site in the kit")
        return endpoint

    def states(self) -> dict[str, LinkState]:
        """How each link is now."""
        return {name: endpoint.state() for name, endpoint in self._endpoints.items()}

    def close(self) -> None:
        """Stop; what waits for an answer fails with ``LinkLost``. Returns within 5 s, whatever a handler does."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._server.stop(0).wait(_CLOSE_S)
        for worker in self._workers.values():
            worker.close(_CLOSE_S)

    def _serve(self, limits: Limits) -> grpc.Server:
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            _TALK: grpc.stream_stream_rpc_method_handler(_Talk(self._talk)),
            _STATUS: grpc.unary_unary_rpc_method_handler(self._tell_status),
        }
        return grpc.server(
            _ThreadPerCall(),
            handlers=[grpc.method_handlers_generic_handler(_SERVICE, handlers)],
            options=[*_options(limits), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=2 * len(self._endpoints) + _SPARE_CALLS,
        )

    def _listen(self, address: str, certificates: Certificates) -> int:
        root, certificate, key = certificates.read()
        credentials = grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=True)
        try:
            port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            found = "it is in use or not of this host, or the certificates are none"
            raise ConfigError(f"listening on '{address}'", found, "choose another") from error
        return int(port)

    def _talk(self, frames: Iterator[bytes], context: grpc.ServicerContext, send: _Send | None) -> Iterator[bytes]:
        connection = self._connect(self._admitted(context), context)
        connection.send = send
        connection.read_with(lambda: _read_call(frames, connection, context))
        yield from connection.frames()
        if connection.problem:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, connection.problem)

    def _admitted(self, context: grpc.ServicerContext) -> str:
        """Name of who calls; a caller who may not ends here."""
        owner = _common_name(context)
        metadata = dict(context.invocation_metadata())
        spoken_for = metadata.get(_SPEAKS_FOR, owner.encode())
        name = (spoken_for if isinstance(spoken_for, bytes) else spoken_for.encode()).decode(errors="replace")
        if name != owner and owner != self._name:
            self._refuse(context, owner, f"'{owner}' may not speak for {name!r}")
        if name not in self._endpoints:
            self._refuse(context, owner, f"{name!r} is not on the list of '{self._name}'")
        return name

    def _refuse(self, context: grpc.ServicerContext, owner: str, found: str) -> NoReturn:
        with self._lock:
            new = owner not in self._refused
            self._refused.add(owner)
        if new:
            _log.warning("%s: refused, and so are later calls", found)
        context.abort(grpc.StatusCode.PERMISSION_DENIED, found)
        raise AssertionError("abort raises")

    def _connect(self, name: str, context: grpc.ServicerContext) -> Connection:
        """Begin the connection of ``name``. One before it ends: a dead one may not have been noticed yet."""
        with self._lock:
            before = self._calls.get(name)
            self._calls[name] = context
            connection = self._endpoints[name].attach()
        if before is not None:
            before.cancel()
        if not context.add_callback(connection.close):
            connection.close()
        return connection

    def _tell_status(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        return json.dumps(dict(self._status())).encode()


class _Talk:
    """A method of a server whose answers any thread may send, not only the one that iterates over them.

    gRPC names that experimental, and its own health service rests on it. Where it is not known, gRPC gives no ``send``
    and iterates over the answers, as ever.
    """

    experimental_non_blocking = True

    def __init__(self, talk: Callable[[Iterator[bytes], grpc.ServicerContext, _Send | None], Iterator[bytes]]) -> None:
        self._talk = talk

    def __call__(
        self, frames: Iterator[bytes], context: grpc.ServicerContext, send: _Send | None = None
    ) -> Iterator[bytes]:
        answers = self._talk(frames, context, send)
        if send is None:
            return answers
        for frame in answers:
            send(frame)
        send(None)
        return iter(())


def _read_call(frames: Iterator[bytes], connection: Connection, context: grpc.ServicerContext) -> None:
    ends = True
    with contextlib.suppress(grpc.RpcError):
        ends = connection.read(frames)
    if ends and not connection.written.wait(_STUCK_S):  # the dialer does not read, so the writer cannot end the call
        context.cancel()


class Dialer:
    """A link to a listener, which is dialled again and again until this is closed.

    Args:
        address: ``host:port`` of the listener.
        certificates: Of this site.
        name: Of this site, as its certificate says.
        listener: Name that the listener's certificate must have.
        handle: Answers its requests, see ``Listener``.
        limits: What the listener may send.
        speaks_for: Name to be taken for, where ``name`` is the listener's own.

    Raises:
        ConfigError: The certificates cannot be read.
    """

    def __init__(
        self,
        address: str,
        certificates: Certificates,
        name: str,
        listener: str,
        handle: ByteHandler,
        limits: Limits = DEFAULT_LIMITS,
        speaks_for: str | None = None,
    ) -> None:
        self._address = address
        self._metadata = ((_SPEAKS_FOR, speaks_for.encode()),) if speaks_for else ()
        self._credentials = _channel_credentials(certificates)
        self._options = [*_options(limits), *_options_of_dialer(listener)]
        self._worker = Worker(f"{speaks_for or name} answers")
        self._endpoint = Endpoint(listener, os.urandom(LIFE_BYTES), limits, handle, self._worker, dials=True)
        self._closing = threading.Event()
        self._call: Any = None
        self._thread = threading.Thread(target=self._dial, name=f"{speaks_for or name} dials", daemon=True)
        self._thread.start()

    @property
    def peer(self) -> str:
        """See ``ByteLink.peer``."""
        return self._endpoint.peer

    def send(self, payload: bytes) -> futures.Future[bytes]:
        """See ``ByteLink.send``."""
        return self._endpoint.send(payload)

    def state(self) -> LinkState:
        """How the link is now."""
        return self._endpoint.state()

    def close(self) -> None:
        """Hang up; what waits for an answer fails with ``LinkLost``. Returns within 5 s, whatever a handler does."""
        self._closing.set()
        self._endpoint.close()
        if self._call is not None:
            self._call.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join(_CLOSE_S)
        self._worker.close(_CLOSE_S)

    def _dial(self) -> None:
        shortest, longest = _BACKOFF_S
        backoff_s = shortest
        while not self._closing.is_set():
            dialled_at = time.monotonic()
            try:
                problem = self._talk()
            except Exception as error:  # such as no thread left: this thread is the link, it must not end
                problem = repr(error)
            if problem and not self._closing.is_set():
                self._endpoint.warn(problem)
            if time.monotonic() - dialled_at > _SETTLED_S:
                backoff_s = shortest
            # Jitter: the dialers of a listener that restarts do not come back all at once.
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, longest)

    def _talk(self) -> str:
        """Hold one connection until it ends; what it ended of."""
        connection = self._endpoint.attach()
        problems: SimpleQueue[str] = SimpleQueue()
        with grpc.secure_channel(self._address, self._credentials, self._options) as channel:
            talk: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{_SERVICE}/{_TALK}")
            self._call = call = talk(connection.frames(), metadata=self._metadata)
            if self._closing.is_set():
                call.cancel()
            impatience = threading.Timer(_WELCOME_S, lambda: None if self._endpoint.peer else call.cancel())
            impatience.daemon = True
            impatience.start()
            try:
                # The thread that reads may be answering for long, and the link shall be there again before it is done.
                call.add_callback(lambda: problems.put(_said(call)) if connection.ends() else None)
                connection.read_with(lambda: self._read_call(call, connection, problems))
                return problems.get()
            finally:
                impatience.cancel()
                call.cancel()
                connection.close()

    def _read_call(self, call: Any, connection: Connection, problems: "SimpleQueue[str]") -> None:
        problem = ""
        try:
            if not connection.read(call):
                return
        except grpc.RpcError as error:
            problem = _said(error)
        except Exception as error:
            _log.exception("the connection to '%s' broke", self._address)
            problem = repr(error)
        problems.put(problem)


def ask_status(address: str, certificates: Certificates, listener: str, timeout_s: float) -> dict[str, JsonValue]:
    """What a listener's ``status`` says; any site of the network may ask.

    Args:
        address: ``host:port`` of the listener.
        certificates: Of this site.
        listener: Name that the listener's certificate must have.
        timeout_s: Seconds to wait.

    Raises:
        LinkTimeout: No answer in time.
        LinkLost: Nobody listens there, or it is not a site of that name and network.
        SiteRefused: The listener does not take the call.
        ConfigError: The certificates cannot be read.
    """
    options = [*_options(DEFAULT_LIMITS), *_options_of_dialer(listener)]
    with grpc.secure_channel(address, _channel_credentials(certificates), options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{_SERVICE}/{_STATUS}")
        try:
            answer = ask(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translated(error, listener, timeout_s) from error
    return _json_object(answer)


def _json_object(answer: bytes) -> dict[str, JsonValue]:
    try:
        status = json.loads(answer)
    except ValueError as error:
        raise WireFormatError("a status that is no JSON") from error
    if not isinstance(status, dict):
        raise WireFormatError("a status that is no JSON object")
    return status


def _translated(error: Any, listener: str, timeout_s: float) -> Exception:
    """A failed unary call as an error of ours."""
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkTimeout(f"the status of '{listener}'", f"no answer for {timeout_s:g} s")
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return SiteRefused(f"the status of '{listener}'", _said(error))
    return LinkLost(listener, _said(error))


def _said(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"


def _channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    root, certificate, key = certificates.read()
    return grpc.ssl_channel_credentials(root, key, certificate)


def _options(limits: Limits) -> list[tuple[str, Any]]:
    """What holds for both ends."""
    frame_bytes = limits.part_bytes + _FRAME_SLACK_BYTES
    keepalive_ms = round(limits.keepalive_s * 1000)
    return [
        ("grpc.max_send_message_length", frame_bytes),
        ("grpc.max_receive_message_length", frame_bytes),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
        # A compressed frame could grow to any size before its length is checked: leave it compressed, and it is none.
        ("grpc.per_message_decompression", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def _options_of_dialer(listener: str) -> list[tuple[str, Any]]:
    shortest, longest = (round(1000 * seconds) for seconds in _BACKOFF_S)
    return [
        ("grpc.ssl_target_name_override", listener),
        # Each connection is a new one, with a back-off of ours.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", shortest),
        ("grpc.min_reconnect_backoff_ms", longest),
        # A proxy could not read the stream, and one that the environment names for web pages may not know the site.
        ("grpc.enable_http_proxy", 0),
    ]


def _common_name(context: grpc.ServicerContext) -> str:
    found: dict[str, Any] = dict(context.auth_context())
    names: list[bytes] = list(found.get("x509_common_name", ()))
    return names[0].decode(errors="replace") if len(names) == 1 else ""


class _ThreadPerCall(futures.ThreadPoolExecutor):
    """A thread for each call. Streams are few and stay long; the server bounds how many there are.

    The threads of the standard pool would keep a process alive that forgets to close its listener.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        done: futures.Future[Any] = futures.Future()

        def call() -> None:
            try:
                done.set_result(fn(*args, **kwargs))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=call, name="gaisnet call", daemon=True).start()
        return done
