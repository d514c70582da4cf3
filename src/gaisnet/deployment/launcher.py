"""Runs a set of named processes on one machine, restarts what dies, and leaves nothing behind.

Knows no model and no engine. A process counts together with everything it started: when it dies, its remains are
killed before it is started again, and ``stop`` ends when nothing of the launch is alive. If the launcher itself is
killed, its processes die with it (PR_SET_PDEATHSIG) and a guard process kills what they had started.
"""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from gaisnet.deployment import processes
from gaisnet.deployment.logs import rotate
from gaisnet.errors import ProcessesLeft, ProcessFailed

FINAL = 3
"""Exit code of a site whose error another start would not cure, such as a wrong setting."""

_TICK_S = 0.1
_KILL_DEADLINE_S = 5.0
_START_DEADLINE_S = 60.0
_LOOK_AT_LOGS_S = 1.0
_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 8.0
_TAIL_LINES = 12
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class ProcessPlan:
    """One process to run.

    Attributes:
        name: Unique in the launch, without slashes.
        command: Program and arguments; run without a shell.
        log: Where standard output and error go; appended to, and kept small.
        more_logs: Files that the process appends to by itself, kept small too.
        environment: Added to the launcher's own.
        final: Exit codes with which it says that another start would end the same way.
        may_finish: Whether exit code 0 means that the work is done. Otherwise every exit is unexpected.
        grace_s: How long ``stop`` waits after SIGTERM before it kills.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    final: tuple[int, ...] = ()
    may_finish: bool = False
    grace_s: float = 5.0
    more_logs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Restarts:
    """A process that dies more than ``most`` times in ``within_s`` seconds is not started again."""

    most: int = 5
    within_s: float = 120.0


Stage = Literal["waiting", "running", "finished", "failed", "stopped"]


@dataclass(frozen=True)
class ProcessState:
    """State of one process; ``waiting`` is between a death and the next start."""

    stage: Stage
    pid: int | None
    starts: int
    exit_code: int | None


class Launcher:
    """Runs ``plans`` from ``start`` to ``stop``; also a context manager.

    Args:
        plans: The processes. They are started in this order, without waiting for each other.
        restarts: When to give up on one.
    """

    def __init__(self, plans: Sequence[ProcessPlan], restarts: Restarts | None = None) -> None:
        self._mark = uuid.uuid4().hex
        self._guard: subprocess.Popen[bytes] | None = None
        self._running = [_Process(plan, f"{self._mark}/{plan.name}", restarts or Restarts()) for plan in plans]
        self._stopping = threading.Event()
        self._started = threading.Event()
        self._stop_lock = threading.Lock()
        # PR_SET_PDEATHSIG means the death of the thread that started the process, not of its parent process: every
        # start is made by this one thread, which lives as long as they do.
        self._thread = threading.Thread(target=self._watch, name="launcher", daemon=True)

    def start(self) -> None:
        """Start everything; returns when each process has been started once."""
        processes.adopt_orphans()
        self._guard = _start_guard(self._mark)
        self._thread.start()
        self._started.wait(_START_DEADLINE_S)

    def check(self) -> None:
        """Raise ``ProcessFailed`` for the first process that was given up."""
        for process in self._running:
            if process.failure is not None:
                raise process.failure

    def wait(self, name: str, timeout_s: float) -> bool:
        """Return whether process ``name`` finished within ``timeout_s``.

        Raises ``ProcessFailed`` if any was given up.
        """
        end = time.monotonic() + timeout_s
        while not (finished := self.states()[name].stage == "finished") and time.monotonic() < end:
            self.check()
            time.sleep(_TICK_S)
        self.check()
        return finished

    def states(self) -> dict[str, ProcessState]:
        """Return the state of each process by name."""
        return {process.plan.name: process.state() for process in self._running}

    def stop(self) -> None:
        """End everything: SIGTERM, each one's grace, SIGKILL. Raises ``ProcessesLeft``; may be called again."""
        with self._stop_lock:
            self._stopping.set()
            if self._thread.ident is not None:
                self._thread.join()
            if self._guard is not None:
                _stop_guard(self._guard)
            left = processes.kill_marked(self._mark, _KILL_DEADLINE_S)
        if left:
            raise ProcessesLeft(left)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        for process in self._running:
            process.launch()
        self._started.set()
        next_look = 0.0
        while not self._stopping.wait(_TICK_S):
            for process in self._running:
                process.tick()
            if time.monotonic() >= next_look:
                self._keep_logs_small()
                next_look = time.monotonic() + _LOOK_AT_LOGS_S
        for process in self._running:
            process.ask_to_end()
        for process in self._running:
            process.end()

    def _keep_logs_small(self) -> None:
        for process in self._running:
            for log in (process.plan.log, *process.plan.more_logs):
                rotate(log)


class _Process:
    """One plan and its present process. All but ``state`` and ``failure`` belong to the launcher's thread."""

    def __init__(self, plan: ProcessPlan, mark: str, restarts: Restarts) -> None:
        self.plan = plan
        self.failure: ProcessFailed | None = None
        self._mark = mark
        self._restarts = restarts
        self._life: subprocess.Popen[bytes] | None = None
        self._stage: Stage = "waiting"
        self._starts = 0
        self._exit_code: int | None = None
        self._deaths: deque[float] = deque()
        self._next_start = 0.0
        self._asked = 0.0

    def state(self) -> ProcessState:
        life = self._life
        return ProcessState(self._stage, life.pid if life else None, self._starts, self._exit_code)

    def launch(self) -> None:
        plan = self.plan
        environment = {**os.environ, **plan.environment, processes.MARK: self._mark}
        command = [sys.executable, "-S", "-E", processes.__file__, "exec", str(os.getpid()), *plan.command]
        try:
            plan.log.parent.mkdir(parents=True, exist_ok=True)
            with plan.log.open("ab") as log:
                self._life = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
        except OSError as error:
            self._give_up(f"could not be started ({error})")
            return
        self._starts += 1
        self._stage = "running"

    def tick(self) -> None:
        """Notice a death; start again when it is time."""
        if self._stage == "waiting" and time.monotonic() >= self._next_start:
            self.launch()
        elif self._stage == "running" and self._life is not None and self._life.poll() is not None:
            self._exit_code, self._life = self._life.returncode, None
            self._bury()

    def ask_to_end(self) -> None:
        self._asked = time.monotonic()
        if self._life is not None:
            with suppress(ProcessLookupError):
                self._life.send_signal(signal.SIGTERM)

    def end(self) -> None:
        if self._life is not None:
            with suppress(subprocess.TimeoutExpired):
                self._life.wait(max(0.0, self._asked + self.plan.grace_s - time.monotonic()))
            self._life.kill()
            with suppress(subprocess.TimeoutExpired):
                self._exit_code = self._life.wait(_KILL_DEADLINE_S)
            self._life = None
        processes.kill_marked(self._mark, _KILL_DEADLINE_S)
        if self._stage in ("running", "waiting"):
            self._stage = "stopped"

    def _bury(self) -> None:
        processes.kill_marked(self._mark, _KILL_DEADLINE_S)
        if self._exit_code == 0 and self.plan.may_finish:
            self._stage = "finished"
            return
        if self._exit_code in self.plan.final:
            self._give_up(f"ended with exit code {self._exit_code}, and would again")
            return
        now = time.monotonic()
        self._deaths.append(now)
        while self._deaths[0] < now - self._restarts.within_s:
            self._deaths.popleft()
        if len(self._deaths) > self._restarts.most:
            self._give_up(
                f"ended {len(self._deaths)} times in {now - self._deaths[0]:.0f} s, "
                f"the last time with exit code {self._exit_code}"
            )
            return
        backoff = min(_LONGEST_BACKOFF_S, _FIRST_BACKOFF_S * 2 ** (len(self._deaths) - 1))
        self._next_start, self._stage = now + backoff, "waiting"
        self._note(f"process '{self.plan.name}' ended with exit code {self._exit_code}; next start in {backoff:.1f} s")

    def _give_up(self, found: str) -> None:
        self._stage = "failed"
        self.failure = ProcessFailed(self.plan.name, found, self.plan.log, _tail(self.plan.log))

    def _note(self, line: str) -> None:
        # A full disk must not end the watch.
        with suppress(OSError), self.plan.log.open("a", encoding="utf-8") as log:
            log.write(f"[launcher] {line}\n")


def _tail(log: Path) -> str:
    """Last lines of a log file."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-_TAIL_LINES:])


def _start_guard(mark: str) -> subprocess.Popen[bytes]:
    """Start the guard. It has no mark, and a session of its own: an end of the launcher does not end it."""
    environment = {name: value for name, value in os.environ.items() if name != processes.MARK}
    command = [sys.executable, "-S", "-E", processes.__file__, "guard", mark]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )


def _stop_guard(guard: subprocess.Popen[bytes]) -> None:
    guard.kill()
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()
