"""The dialing end of a link, which reconnects until it is closed."""

import logging
import os
import random
import threading
import time
from concurrent import futures
from queue import SimpleQueue
from typing import Any

import grpc

from gaisnet.transport.connection import Connection
from gaisnet.transport.endpoint import ByteHandler, Endpoint
from gaisnet.transport.frames import LIFE_BYTES
from gaisnet.transport.grpc.channel import (
    BACKOFF_S,
    SERVICE,
    SPEAKS_FOR,
    TALK,
    Certificates,
    channel_credentials,
    options,
    options_of_dialer,
    said,
)
from gaisnet.transport.stream import DEFAULT_LIMITS, Limits, LinkState
from gaisnet.transport.worker import Worker

_CLOSE_S = 2.0  # for each of the two things that closing waits for
_WELCOME_S = 15.0
_BACKOFF_S = BACKOFF_S
_SETTLED_S = 5.0  # a connection that lasted this long was a good one
_log = logging.getLogger(__name__)


class Dialer:
    """A link to a listener, redialed until this is closed.

    Args:
        address: ``host:port`` of the listener.
        certificates: This site's certificates.
        name: Name of this site, as in its certificate.
        listener: Name that the listener's certificate must have.
        handle: Answers its requests, see ``Listener``.
        limits: Limits on the listener's messages.
        speaks_for: Name to act for, if ``name`` is the listener's own.

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
        self._metadata = ((SPEAKS_FOR, speaks_for.encode()),) if speaks_for else ()
        self._credentials = channel_credentials(certificates)
        self._options = [*options(limits), *options_of_dialer(listener, _BACKOFF_S)]
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
        """Return the state of the link."""
        return self._endpoint.state()

    def close(self) -> None:
        """Hang up; pending requests fail with ``LinkLost``. Returns within 5 s, whatever a handler does."""
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
            except Exception as error:  # such as no thread left: this thread is the link and must not end
                problem = repr(error)
            if problem and not self._closing.is_set():
                self._endpoint.warn(problem)
            if time.monotonic() - dialled_at > _SETTLED_S:
                backoff_s = shortest
            # Jitter: the dialers of a restarted listener do not come back all at once.
            self._closing.wait(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, longest)

    def _talk(self) -> str:
        """Hold one connection until it ends; return the reason."""
        connection = self._endpoint.attach()
        problems: SimpleQueue[str] = SimpleQueue()
        with grpc.secure_channel(self._address, self._credentials, self._options) as channel:
            talk: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/{TALK}")
            self._call = call = talk(connection.frames(), metadata=self._metadata)
            if self._closing.is_set():
                call.cancel()
            impatience = threading.Timer(_WELCOME_S, lambda: None if self._endpoint.peer else call.cancel())
            impatience.daemon = True
            impatience.start()
            try:
                # The reading thread may be answering for long, and the link must be up again before it is done.
                call.add_callback(lambda: problems.put(said(call)) if connection.ends() else None)
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
            problem = said(error)
        except Exception as error:
            _log.exception("the connection to '%s' broke", self._address)
            problem = repr(error)
        problems.put(problem)
