"""Peak memory, from the operating system, of work that has a process of its own: the interpreter and torch included."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from gaisnet.errors import MeasureError

_STATUS = Path("/proc/self/status")
_KIB = 1024


def peak_bytes(work: Callable[..., None], *args: Any) -> int:
    """Most memory that a new process holds in RAM until ``work(*args)`` is done; arguments must be picklable.

    Raises ``MeasureError`` where the process fails, which has then told why on its standard error.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(there, work, args))
    process.start()
    there.close()
    try:
        peak: int = here.recv()
    except EOFError:
        process.join()
        raise MeasureError("the memory of a process", f"it ended with code {process.exitcode}") from None
    process.join()
    return peak


def _report(pipe: Connection, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    work(*args)
    pipe.send(_most_resident())


def _most_resident() -> int:
    """Of this process since its program was started: ``ru_maxrss`` would remember the one that started it."""
    if _STATUS.is_file():
        (line,) = (line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * _KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * _KIB
