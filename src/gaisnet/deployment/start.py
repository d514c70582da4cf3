"""Runs one site on its own host."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from gaisnet.deployment.launcher import FINAL, Launcher, ProcessPlan, ProcessState
from gaisnet.deployment.outcome import read_outcome, record_failure
from gaisnet.deployment.site import CLOUD, START_LOCK, Role, claimed, read_site
from gaisnet.deployment.validity import check_validity
from gaisnet.engines.nvflare.kit import AUDIT_FILE, ENVIRONMENT, client_command, server_command
from gaisnet.errors import ConfigError, GaisnetError

Tell = Callable[[str], None]

_LOOK_S = 1.0
_DAY_S = 86_400.0
_NVFLARE_GRACE_S = 1.0  # its parents leave at once, its job processes take many seconds: these are killed


def plans(folder: Path, logs: Path, out: Path | None = None, more: Sequence[str] = ()) -> list[ProcessPlan]:
    """Return the processes of one site. Raises ``KitUnreadable``.

    Args:
        folder: Its kit.
        logs: Folder of their logs.
        out: The cloud's output folder.
        more: Further arguments of the resident process.
    """
    site = read_site(folder)
    folder = folder.resolve()
    output = ("--out", str(out.resolve())) if out and site.role == CLOUD else ()
    command = (sys.executable, "-m", "gaisnet.cli", site.role, str(folder), *output, *more)
    resident = ProcessPlan(site.name, command, logs / f"{site.name}.log", may_finish=site.role == CLOUD, final=(FINAL,))
    if site.role == "device":
        return [resident]
    engine = server_command(folder) if site.role == CLOUD else client_command(folder, site.name)
    name = f"{site.name}-nvflare"
    beside = ProcessPlan(
        name,
        tuple(engine),
        logs / f"{name}.log",
        environment=ENVIRONMENT,
        grace_s=_NVFLARE_GRACE_S,
        more_logs=(folder / AUDIT_FILE,),
    )
    return [beside, resident]


def start_site(
    folder: Path, out: Path | None = None, stay: bool = False, serve: int | None = None, tell: Tell = lambda _: None
) -> None:
    """Run a site until the cloud's run has finished, or the process is ended. Raises ``GaisnetError``.

    Args:
        folder: Its kit.
        out: A cloud's output folder.
        stay: A cloud goes on answering when the run has finished.
        serve: Port at which a device answers callers.
        tell: Takes a sentence about each start and end of a process, and about certificates that expire.
    """
    site = read_site(folder)
    for given, role in ((stay, CLOUD), (serve is not None, "device")):
        if given and site.role != role:
            option = "--stay" if role == CLOUD else "--serve"
            raise ConfigError(f"{option} at '{site.name}'", f"the kit's role is {site.role}", f"give it to a {role}")
    more = [*(["--stay"] if stay else []), *(["--serve", str(serve)] if serve is not None else [])]
    with claimed(folder, START_LOCK), failure_recorded(folder):
        certificate = _Certificate(folder, site.role, tell)
        certificate.look()
        every = plans(folder, folder.resolve() / "logs", out, more)
        reports = _Reports(every, tell)
        with Launcher(every) as launcher:
            while not launcher.wait(site.name, _LOOK_S):
                reports.look(launcher.states())
                certificate.look_daily()
            reports.look(launcher.states())


@contextmanager
def failure_recorded(folder: Path) -> Iterator[None]:
    """Record in a kit why its site was given up, unless the site itself has."""
    began = time.time()
    try:
        yield
    except GaisnetError as error:
        outcome = read_outcome(folder)
        if outcome is None or outcome.stage != "failed" or outcome.since < began:
            record_failure(folder, error, outcome.output if outcome else "")
        raise


class _Reports:
    """Reports changes of processes between two looks."""

    def __init__(self, every: Sequence[ProcessPlan], tell: Tell) -> None:
        self._logs = {plan.name: plan.log for plan in every}
        self._told: dict[str, tuple[str, int]] = {}
        self._tell = tell

    def look(self, states: Mapping[str, ProcessState]) -> None:
        for name, state in states.items():
            seen = state.stage, state.starts
            if self._told.get(name) != seen:
                self._told[name] = seen
                self._tell(f"{name}: {self._sentence(name, state)}")

    def _sentence(self, name: str, state: ProcessState) -> str:
        if state.stage == "running":
            again = f" again, start {state.starts}," if state.starts > 1 else ""
            return f"started{again} as process {state.pid}; its log is {self._logs[name]}"
        if state.stage == "waiting":
            return f"ended with exit code {state.exit_code}; it is started again"
        return state.stage


class _Certificate:
    """Checks a kit's certificates now and then while its site runs."""

    def __init__(self, folder: Path, role: Role, tell: Tell) -> None:
        self._folder = folder
        self._role = role
        self._tell = tell
        self._next = 0.0

    def look(self) -> None:
        """Report if they expire soon. Raises ``CertificateInvalid``."""
        self._next = time.monotonic() + _DAY_S
        warning = check_validity(self._folder, self._role).warning(datetime.now(UTC))
        if warning:
            self._tell(f"{self._folder.resolve().name}: {warning}")

    def look_daily(self) -> None:
        """Check once a day; standing links outlive a certificate, so nothing ends because of it."""
        if time.monotonic() >= self._next:
            try:
                self.look()
            except GaisnetError as error:
                self._tell(str(error))
