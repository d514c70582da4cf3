"""A server: an application on a socket, and limits on connections. The one home of uvicorn.

uvicorn limits how long a connection may be idle between two requests. This module limits the time that a
request's head and body take, the time in which a caller takes nothing of an answer, and the number of connections.
"""

import asyncio
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from gaisnet.config import FrontSettings
from gaisnet.errors import ConfigError
from gaisnet.serving.http.callers import ApiKeys, check_bind

_log = logging.getLogger(__name__)
_BODY_GRACE_S = 2.0  # for the application, which answers a slow body itself
_QUIET_S = 60.0  # between two log lines about the same problem
_NO_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PIECE_BYTES = 2**12  # parsed before others have their turn; a chunk may be one byte out of six
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n"
_GRACE_S = 5  # for requests in progress when the server ends


class ListeningSocket(socket.socket):
    """A listening socket that keeps working when the process is out of file descriptors.

    It keeps one in reserve, with which it accepts and closes a connection that cannot be kept. Otherwise it would
    stay in the queue, and the event loop would be notified again and again.
    """

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(listening.family, listening.type, listening.proto, listening.detach())
        self._reserve: int | None = os.open(os.devnull, os.O_RDONLY)
        self._told = -_QUIET_S

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the next connection. Raises ``BlockingIOError`` if there is none that can be kept."""
        try:
            return super().accept()
        except OSError as error:
            if error.errno not in _NO_FILES:
                raise
            self._turn_away(error)
            raise BlockingIOError(errno.EAGAIN, "turned away") from None

    def close(self) -> None:
        """Stop listening."""
        self._free_reserve()
        super().close()

    def _turn_away(self, error: OSError) -> None:
        if time.monotonic() - self._told >= _QUIET_S:
            self._told = time.monotonic()
            _log.error("connections are turned away (%s); raise the limit of open files", error.strerror)
        if not self._free_reserve():
            time.sleep(0.01)  # others took it; spinning would cost a whole core
        try:
            super().accept()[0].close()
        except OSError:
            pass  # another thread was quicker, or the caller has left
        try:
            self._reserve = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            self._reserve = None

    def _free_reserve(self) -> bool:
        reserve, self._reserve = self._reserve, None
        if reserve is not None:
            os.close(reserve)
        return reserve is not None


class HttpConnection(H11Protocol):
    """A caller's connection. ``settings`` is set by ``http_connection_class``."""

    settings: FrontSettings

    def __init__(self, config: Config, *args: Any, **named: Any) -> None:
        super().__init__(config, *args, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        self._phase: tuple[object, object] = (None, None)
        self._since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        if len(self.connections) >= self.settings.max_connections and not self._displace():
            transport.write(_BUSY)
            transport.close()
        super().connection_made(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = _PIECE_BYTES
        self._enter()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if not self.transport.is_closing():
            super().data_received(data)
            self._enter()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        for timer in (self._deadline, self._sending):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See ``asyncio.Protocol``: the caller takes less than is sent."""
        super().pause_writing()
        self._sending = self.loop.call_later(self.settings.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """See ``asyncio.Protocol``."""
        super().resume_writing()
        if self._sending is not None:
            self._sending.cancel()

    def on_response_complete(self) -> None:
        """See ``H11Protocol``."""
        super().on_response_complete()
        self._enter(answered=True)

    @property
    def waiting_since(self) -> float | None:
        """Time since when it owes the head of a request; None while a request is answered."""
        return self._since if self.conn.their_state is h11.IDLE else None

    def _enter(self, answered: bool = False) -> None:
        """Set the deadline of what the caller owes now: a head, a body, or nothing."""
        state = self.conn.their_state
        if (state, self.cycle) == self._phase and not answered:
            return
        self._phase, self._since = (state, self.cycle), time.monotonic()
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None
        if state is h11.SEND_BODY:
            self._deadline = self.loop.call_later(self.settings.body_timeout_s + _BODY_GRACE_S, self.transport.abort)
        elif state is h11.IDLE and answered:
            self._phase = (None, None)  # idle: uvicorn's own limit holds until the next byte
        elif state is h11.IDLE:
            self._deadline = self.loop.call_later(self.settings.head_timeout_s, self.transport.abort)

    def _displace(self) -> bool:
        """End the connection that has owed a head for the longest time; return whether there is one."""
        owing = [
            each for each in self.connections if isinstance(each, HttpConnection) and each.waiting_since is not None
        ]
        if not owing:
            return False
        oldest = min(owing, key=lambda each: each.waiting_since or 0.0)
        self.connections.discard(oldest)
        oldest.transport.abort()
        return True


def http_connection_class(settings: FrontSettings) -> type[HttpConnection]:
    """Return the protocol class with these limits, for uvicorn."""
    return type("HttpConnection", (HttpConnection,), {"settings": settings})


class Server:
    """Listens from the beginning; answers inside ``run`` or ``in_thread``, of which one may be used, once.

    Args:
        app: The application.
        host: Address to listen on.
        port: TCP port; 0 takes a free one.
        keys: Keys that the application requires.
        listening: A socket that listens there already.
        settings: Limits of connections.

    Raises:
        ConfigError: The address is not available, or others could ask without a key.
    """

    def __init__(
        self,
        app: ASGIApp,
        host: str,
        port: int,
        keys: ApiKeys,
        listening: socket.socket | None = None,
        settings: FrontSettings | None = None,
    ) -> None:
        check_bind(host, keys)
        settings = settings or FrontSettings()
        self._socket = ListeningSocket(listening or listen(host, port))
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",  # it accepts connections from the listener itself
                http=http_connection_class(settings),
                ws="none",
                log_config=None,  # its log lines go where ours go
                log_level="error",  # callers' mistakes are not this server's errors
                access_log=False,  # prompts are private, and so is who asks when
                server_header=False,
                timeout_keep_alive=settings.idle_timeout_s,
                timeout_graceful_shutdown=_GRACE_S,
                lifespan="on",
            )
        )

    def run(self) -> None:
        """Answer until the process is told to end (SIGINT, SIGTERM), then finish requests in progress."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    @contextmanager
    def in_thread(self) -> Iterator[str]:
        """Answer in a thread inside the context; yield the URL."""
        thread = threading.Thread(target=self.run, name="server", daemon=True)
        thread.start()
        try:
            yield self.url
        finally:
            self._server.should_exit = True
            thread.join()


def listen(host: str, port: int) -> socket.socket:
    """Bind an address. Raises ``ConfigError`` if it is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        do = "choose another with --host and --port"
        raise ConfigError(f"listening on '{host}', port {port}", error.strerror or str(error), do) from error
