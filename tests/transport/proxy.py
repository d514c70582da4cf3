"""A TCP proxy that can hang up, for tests of links over a network that drops."""

import contextlib
import socket
import threading


class Proxy:
    """Passes on every connection to ``port`` of this host; listens on ``self.port``."""

    def __init__(self, port: int) -> None:
        self.target = port
        self._server = socket.create_server(("localhost", 0))
        self.port: int = self._server.getsockname()[1]
        self.passed_bytes = 0
        self._drop_after: int | None = None
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def drop(self) -> None:
        """Hang up on both sides of every connection; new ones are passed on again."""
        with self._lock:
            sockets, self._open = self._open, []
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    @property
    def dropped(self) -> bool:
        """What ``drop_after`` asked for has happened."""
        return self._drop_after is None

    def drop_after(self, more_bytes: int) -> None:
        """Hang up when so many more bytes have passed."""
        self._drop_after = self.passed_bytes + more_bytes

    def close(self) -> None:
        """Hang up and listen no more."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.drop()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._server.accept()
                try:
                    there = socket.create_connection(("localhost", self.target))
                except OSError:
                    here.close()
                    continue
                with self._lock:
                    self._open += [here, there]
                self._threads += [self._passing(here, there), self._passing(there, here)]

    def _passing(self, source: socket.socket, sink: socket.socket) -> threading.Thread:
        thread = threading.Thread(target=self._pass, args=(source, sink), daemon=True)
        thread.start()
        return thread

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**14):
                sink.sendall(data)
                self.passed_bytes += len(data)
                if self._drop_after is not None and self.passed_bytes > self._drop_after:
                    self._drop_after = None
                    self.drop()
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
