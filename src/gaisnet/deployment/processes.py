"""Processes of one launch on this machine: found by a mark in their environment, wherever they ended up.

Parentage and process groups are not enough: a site may start processes of its own in sessions of their own (NVFlare's
job processes do), and these outlive it. The environment is inherited by all of them. Linux only (/proc, prctl).

The file is also run as a script, without the package (so it imports the standard library only):

* ``processes.py exec PARENT COMMAND...`` becomes COMMAND, and dies with PARENT;
* ``processes.py guard MARK`` waits for its standard input to end, which is when the launcher is gone for whatever
  reason, and kills what the launcher left.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "GAISNET_LAUNCH"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.02


def marked(mark: str) -> list[int]:
    """Return the living processes whose mark is ``mark`` or below it (``mark/...``). Zombies are not alive."""
    exact, below = f"{MARK}={mark}".encode(), f"{MARK}={mark}/".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            variables = (entry / "environ").read_bytes().split(b"\0")
            if any(variable == exact or variable.startswith(below) for variable in variables):
                found.append(int(entry.name))
    return found


def kill_marked(mark: str, deadline_s: float) -> list[int]:
    """Send SIGKILL to every process under ``mark`` until none is left; return those still alive at the deadline."""
    end = time.monotonic() + deadline_s
    killed: set[int] = set()
    while (left := marked(mark)) and time.monotonic() < end:
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        killed.update(left)
        time.sleep(_POLL_S)
    for process in killed.difference(left):
        _reap(process, end)
    return left


def adopt_orphans() -> None:
    """Make this process the parent of grandchildren whose parent dies, so that ``kill_marked`` leaves no zombies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _reap(process: int, end: float) -> None:
    """Take a dying child's exit code. Not our child: nothing to do."""
    with suppress(ChildProcessError):
        while os.waitpid(process, os.WNOHANG) == (0, 0) and time.monotonic() < end:
            time.sleep(_POLL_S)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _exec(parent: int, command: list[str]) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the request was in force.
    if os.getppid() == parent:
        os.execvp(command[0], command)


def _guard(mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1024):
        pass
    kill_marked(mark, deadline_s=10)


if __name__ == "__main__":
    if sys.argv[1] == "exec":
        _exec(int(sys.argv[2]), sys.argv[3:])
    else:
        _guard(sys.argv[2])
