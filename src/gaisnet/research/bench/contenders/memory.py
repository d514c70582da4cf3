"""Memory of work in a process of its own, measured by the operating system, interpreter and torch included."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from gaisnet.errors import MeasureError

T = TypeVar("T")
_STATUS = Path("/proc/self/status")
_KIB = 1024


def apart(work: Callable[..., T], *args: Any) -> T:
    """Run ``work(*args)`` in a new process and return its result; arguments and result must be picklable.

    Raises ``MeasureError`` if the process fails; its standard error says why.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, work, args))
    process.start()
    there.close()
    try:
        result: T = here.recv()
    except EOFError:
        process.join()
        raise MeasureError("what a process was to find", f"it ended with code {process.exitcode}") from None
    process.join()
    return result


def peak_bytes(work: Callable[..., None], *args: Any) -> int:
    """Return the most memory that a new process holds in RAM until ``work(*args)`` is done; see ``apart``."""
    return apart(_peak, work, args)


def resident_bytes() -> int:
    """Return what this process holds in RAM now, or its peak where the system reports only that."""
    return _status("VmRSS") if _STATUS.is_file() else _most_resident()


def _report(pipe: Connection, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    pipe.send(work(*args))


def _peak(work: Callable[..., None], args: tuple[Any, ...]) -> int:
    work(*args)
    return _most_resident()


def _most_resident() -> int:
    """Return this process's peak since its program started; ``ru_maxrss`` would include the parent's."""
    if _STATUS.is_file():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB


def _status(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name))
    return int(line.split()[1]) * _KIB
