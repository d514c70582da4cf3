"""The listening end of links: others dial it, and each of them keeps one bidirectional stream.

Both ends show certificates of the same network (mutual TLS). The listener takes a dialer's name from its certificate
and refuses every name that is not on its list. A dialer refuses a listener of another name. gRPC carries raw bytes;
``endpoint`` and ``session`` give them meaning.

A caller is identified by its certificate. It has a quota of calls, so that one site cannot lock out others, and a
connection without a call is closed after a while. Connections have a common limit only: before the handshake their
owner is unknown. A firewall can limit them by address.
"""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NoReturn

import grpc
from pydantic import JsonValue

from gaisnet.errors import ConfigError
from gaisnet.transport.admission import Admission, OnceIn, Rate
from gaisnet.transport.connection import Connection
from gaisnet.transport.endpoint import ByteHandler, Endpoint
from gaisnet.transport.frames import LIFE_BYTES
from gaisnet.transport.grpc.calls import Send, Talk, ThreadPerCall, common_name
from gaisnet.transport.grpc.channel import SERVICE, SPEAKS_FOR, STATUS, TALK, Certificates, options
from gaisnet.transport.grpc.descriptors import room_for_connections
from gaisnet.transport.stream import DEFAULT_LIMITS, ByteLink, Limits, LinkState
from gaisnet.transport.worker import Worker

_CLOSE_S = 2.0  # for each of the two things that closing waits for
_STUCK_S = 1.0
_WARN_EVERY_S = 60.0
# A connection that has not shown a certificate after so long, or has had no call for so long, is closed: whoever can
# reach the port can open one.
_HANDSHAKE_S = 10.0
_IDLE_S = 10.0
_CALLS_PER_CONNECTION = 4  # a dialer has one
# A stream takes the place of the one before it, which takes a moment to end. A dialer comes again every 0.1 s at most.
_STREAMS = Rate(at_once=4, burst=60, per_s=2.0)
_STATUSES = Rate(at_once=2, burst=20, per_s=5.0)
_STATUS_S = 5.0  # for a caller to take the answer
_SPARE_CALLS = 64  # for callers that are refused, each for a moment
_log = logging.getLogger(__name__)


class Listener:
    """A server that others dial.

    Args:
        address: ``host:port``; port 0 takes a free one.
        certificates: This site's certificates.
        name: Name of this site. A dialer with a certificate of this same name may act for others.
        accepts: Names that may dial.
        handle: Answers requests, one after the other, each in any thread; those of one site in order, sites in turn. It
            may send requests over all links.
        limits: Limits on dialers' messages.
        status: Answers ``ask_status``, in threads of its own; must not wait for anything.
        aside: Those of ``accepts`` whose requests do not wait for requests of the others, nor the other way round.
        limits_aside: Limits on messages of those; None for the same as the others.

    Raises:
        ConfigError: The certificates cannot be read, or the address is not available.
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
        limits_aside: Limits | None = None,
    ) -> None:
        self._name = name
        self._status = status
        self._workers = {apart: Worker(f"{name} answers") for apart in (False, True)}
        incarnation = os.urandom(LIFE_BYTES)
        limits_of = {False: limits, True: limits_aside or limits}
        self._endpoints = {
            other: Endpoint(
                other, incarnation, limits_of[other in aside], handle, self._workers[other in aside], dials=False
            )
            for other in accepts
        }
        self._lock = threading.Lock()
        self._calls: dict[str, grpc.ServicerContext] = {}
        self._warnings: dict[str, OnceIn] = {}  # by name of the refused caller
        self._talks, self._statuses = Admission(_STREAMS), Admission(_STATUSES)
        self._server = self._serve(limits)
        self.port = self._listen(address, certificates)
        self._server.start()

    def link(self, name: str) -> ByteLink:
        """Return the link to an accepted name, whether it has dialed or not.

        Raises ``ConfigError`` for another name.
        """
        endpoint = self._endpoints.get(name)
        if endpoint is None:
            accepts = ", ".join(sorted(self._endpoints)) or "nobody"
            raise ConfigError(f"a link to '{name}'", f"'{self._name}' accepts {accepts}", "list the site in the kit")
        return endpoint

    def states(self) -> dict[str, LinkState]:
        """Return the state of each link."""
        return {name: endpoint.state() for name, endpoint in self._endpoints.items()}

    def close(self) -> None:
        """Stop; pending requests fail with ``LinkLost``. Returns within 5 s, whatever a handler does."""
        for endpoint in self._endpoints.values():
            endpoint.close()
        self._server.stop(0).wait(_CLOSE_S)
        for worker in self._workers.values():
            worker.close(_CLOSE_S)

    def _serve(self, limits: Limits) -> grpc.Server:
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            TALK: grpc.stream_stream_rpc_method_handler(Talk(self._talk)),
            # One request, one reply. But a handler of these gets a thread that waits for the request to come.
            STATUS: grpc.stream_stream_rpc_method_handler(self._tell_status),
        }
        return grpc.server(
            ThreadPerCall(),
            handlers=[grpc.method_handlers_generic_handler(SERVICE, handlers)],
            options=[*options(limits), *_options_of_listener()],
            maximum_concurrent_rpcs=_STREAMS.at_once * len(self._endpoints) + _SPARE_CALLS,
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

    def _talk(self, frames: Iterator[bytes], context: grpc.ServicerContext, send: Send | None) -> Iterator[bytes]:
        name = self._admitted(context)
        with self._within(self._talks, name, context):
            connection = self._connect(name, context)
            connection.send = send
            connection.read_with(lambda: _read_call(frames, connection, context))
            yield from connection.frames()
            if connection.problem:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, connection.problem)

    @contextlib.contextmanager
    def _within(self, admission: Admission, name: str, context: grpc.ServicerContext) -> Iterator[None]:
        """Count a call of ``name`` inside the context; refuse one beyond its quota."""
        found = admission.enter(name)
        if found:
            self._refuse(context, name, found, grpc.StatusCode.RESOURCE_EXHAUSTED)
        try:
            yield
        finally:
            admission.leave(name)

    def _admitted(self, context: grpc.ServicerContext) -> str:
        """Return the caller's name; refuse a caller that is not accepted."""
        owner = common_name(context)
        metadata = dict(context.invocation_metadata())
        spoken_for = metadata.get(SPEAKS_FOR, owner.encode())
        name = (spoken_for if isinstance(spoken_for, bytes) else spoken_for.encode()).decode(errors="replace")
        if name != owner and owner != self._name:
            self._refuse(context, owner, f"'{owner}' may not speak for {name!r}")
        if name not in self._endpoints:
            self._refuse(context, owner, f"{name!r} is not on the list of '{self._name}'")
        return name

    def _refuse(
        self,
        context: grpc.ServicerContext,
        owner: str,
        found: str,
        code: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED,
    ) -> NoReturn:
        with self._lock:
            warnings = self._warnings.setdefault(owner, OnceIn(_WARN_EVERY_S))
        if warnings.due():
            _log.warning("%s: refused; of later calls nothing is said for a minute", found)
        context.abort(code, found)
        raise AssertionError("abort raises")

    def _connect(self, name: str, context: grpc.ServicerContext) -> Connection:
        """Begin the connection of ``name``. The previous one ends: a dead one may not have been noticed yet."""
        with self._lock:
            before = self._calls.get(name)
            self._calls[name] = context
            connection = self._endpoints[name].attach()
        if before is not None:
            before.cancel()
        if not context.add_callback(connection.close):
            connection.close()
        return connection

    def _tell_status(self, _requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._within(self._statuses, common_name(context), context):
            impatience = threading.Timer(_STATUS_S, context.cancel)
            impatience.daemon = True
            impatience.start()
            try:
                yield json.dumps(dict(self._status())).encode()
            finally:
                impatience.cancel()


def _options_of_listener() -> list[tuple[str, Any]]:
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", round(1000 * _HANDSHAKE_S)),
        ("grpc.max_connection_idle_ms", round(1000 * _IDLE_S)),
        ("grpc.max_concurrent_streams", _CALLS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", room_for_connections()),
    ]


def _read_call(frames: Iterator[bytes], connection: Connection, context: grpc.ServicerContext) -> None:
    ends = True
    with contextlib.suppress(grpc.RpcError):
        ends = connection.read(frames)
    if ends and not connection.written.wait(_STUCK_S):  # the dialer does not read, so the writer cannot end the call
        context.cancel()
