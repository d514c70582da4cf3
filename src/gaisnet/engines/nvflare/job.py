"""Keeps the one job of a network running, whatever happens to NVFlare's processes.

NVFlare fails a job when one of its processes dies, and forgets running jobs when its server does, so the job must be
watched. A process of its own does that (``job_session``): each session with NVFlare's server leaves
threads behind that never end, its calls have no reliable deadline, and it prints at will.
"""

import json
import logging
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gaisnet.errors import KitUnreadable

_CONNECT_S = 2.0
_PAUSE_S = 2.0
_CLOSE_S = 14.0
_KILL_S = 1.0
_logger = logging.getLogger(__name__)


class JobKeeper:
    """Keeps the job running from ``start`` to ``close``.

    Args:
        admin_kit: Folder of the administrator's kit.
        edges: Names of the edges; a job is submitted when all of them are connected.

    Raises:
        KitUnreadable: The folder is not an administrator's kit.
    """

    def __init__(self, admin_kit: Path, edges: Sequence[str]) -> None:
        self._kit = admin_kit.resolve()
        self._user, self._server = _read(admin_kit)
        self._edges = list(edges)
        self._closing = threading.Event()
        self._state = "not started"
        # What the next session has to know: the job that is ours, and in which life of the server it was submitted.
        self._ours: dict[str, object] = {"job": "", "server": None}
        self._session: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="job keeper", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def describe(self) -> str:
        """Return what is known now, in words."""
        return self._state

    def close(self) -> None:
        """Abort the job and leave the network, within 15 s in every case."""
        self._closing.set()
        with self._lock:
            session = self._session
        if session is not None and session.stdin is not None:
            session.stdin.close()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_S)
        if session is not None and self._thread.is_alive():
            session.kill()
            self._thread.join(_KILL_S)
        self._state = "closed"

    def _work(self) -> None:
        while not self._closing.is_set():
            if self._is_reachable():
                self._hold_session()
            else:
                self._tell("NVFlare's server cannot be reached at {}:{}".format(*self._server))
            self._closing.wait(_PAUSE_S)

    def _is_reachable(self) -> bool:
        """Return whether the server is reachable.

        Cheaper than a session, which needs a second of CPU time to find out.
        """
        with suppress(OSError), socket.create_connection(self._server, _CONNECT_S):
            return True
        return False

    def _hold_session(self) -> None:
        """Follow one session until it ends."""
        with self._lock:
            if self._closing.is_set():
                return
            self._session = session = self._start_session()
        with session:
            for line in session.stdout or ():
                self._take(line)
        self._tell(f"the session with NVFlare's server ended: {self._state}")

    def _start_session(self) -> "subprocess.Popen[bytes]":
        order = {"kit": str(self._kit), "user": self._user, "edges": self._edges, **self._ours}
        command = [sys.executable, "-u", "-m", "gaisnet.engines.nvflare.job_session", json.dumps(order)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=self._kit / "transfer")

    def _take(self, line: bytes) -> None:
        """Process a line of the session: an object of ours, or text that NVFlare printed."""
        with suppress(ValueError, KeyError, TypeError):
            told = json.loads(line)
            self._ours = {"job": told["job"], "server": told["server"]}
            self._tell(str(told["state"]))

    def _tell(self, state: str) -> None:
        if state != self._state:
            _logger.info("%s", state)
        self._state = state


def _read(admin_kit: Path) -> tuple[str, tuple[str, int]]:
    """Return the administrator's name, and host and port of NVFlare's server."""
    try:
        admin = json.loads((admin_kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]
        return str(admin["username"]), (str(admin["host"]), int(admin["port"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitUnreadable(admin_kit, f"'startup/fed_admin.json' cannot be read ({error!r})") from error
