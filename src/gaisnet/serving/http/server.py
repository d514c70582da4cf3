"""A server: an application on a socket. The one home of uvicorn."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from gaisnet.config import FrontSettings
from gaisnet.errors import ConfigError
from gaisnet.serving.http.callers import ApiKeys, check_bind
from gaisnet.serving.http.connections import Listener, connection_of

_GRACE_S = 5


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
        self._socket = Listener(listening or listen(host, port))
        name = f"[{host}]" if ":" in host else host
        self.url = f"http://{name}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",  # it accepts connections from the listener itself
                http=connection_of(settings),
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
