"""The address of a server, in a file beside the run that it serves, while it does.

Anyone who can write into the folder can write the file, so it is checked: see ``read_address``.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gaisnet.errors import ServerRefused
from gaisnet.serving.http.callers import is_loopback

ADDRESS_NAME = "serving.url"
"""File in a run's or device kit's folder: the URL in its first line, the process in its second."""

_LONGEST = 2000  # bytes; a genuine file has far fewer
_ANY = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # hosts that stand for all addresses of a machine


@dataclass(frozen=True)
class _Owner:
    """A process, identified by number and start: numbers are reused."""

    host: str
    process: int
    started: str

    def __str__(self) -> str:
        return f"{self.host} {self.process} {self.started}"

    @property
    def alive(self) -> bool:
        return self.host == socket.gethostname() and _started(self.process) == self.started


@contextmanager
def publish_address(folder: Path, url: str) -> Iterator[None]:
    """Keep the file in a folder inside the context; it is removed however the context ends."""
    path = folder / ADDRESS_NAME
    owner = _Owner(socket.gethostname(), os.getpid(), _started(os.getpid()))
    text = f"{_near(url)}\n{owner}\n"
    with suppress(OSError):  # the folder may be read-only
        path.write_text(text, encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_text(encoding="utf-8") == text:
                path.unlink()


def read_address(folder: Path) -> str | None:
    """Return the URL of the server that a folder's file names; None if there is no file, or its process has ended.

    Raises ``ServerRefused`` for any address but this machine's own: such a file is forged, or came with the folder from
    elsewhere.
    """
    try:
        with (folder / ADDRESS_NAME).open("rb") as file:
            lines = file.read(_LONGEST).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    url = lines[0].strip() if lines else ""
    if not _is_own(url):
        say = f"'{folder / ADDRESS_NAME}' names it, and it is no address of this machine; if it is right, give the URL"
        raise ServerRefused(url, say)
    host, _, rest = (lines[1] if len(lines) > 1 else "").partition(" ")
    number, _, started = rest.partition(" ")
    if not number.isdecimal() or not _Owner(host, int(number), started).alive:
        return None
    return url


def _is_own(url: str) -> bool:
    """Return whether a URL is ``http://`` and a loopback address, without parts that could lead elsewhere."""
    try:
        parts = urlsplit(url)
        plain = parts.username is None and parts.path in ("", "/") and not parts.query and not parts.fragment
        return parts.scheme == "http" and plain and parts.port is not None and is_loopback(parts.hostname or "")
    except ValueError:
        return False


def _near(url: str) -> str:
    """Return a URL as this machine itself reaches it."""
    parts = urlsplit(url)
    host = _ANY.get(parts.hostname or "")
    return url if host is None else f"http://{host}:{parts.port}"


def _started(process: int) -> str:
    """Return when a process began, in the system's own words; empty if there is no such process, or it is unknown."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace")
        return stat.rpartition(")")[2].split()[19]  # ticks since boot
    except (OSError, IndexError):
        pass
    try:
        told = subprocess.run(["ps", "-o", "lstart=", "-p", str(process)], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return " ".join(told.stdout.split())
