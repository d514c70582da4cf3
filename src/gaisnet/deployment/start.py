"""Runs one site on its own host."""

import sys
from collections.abc import Sequence
from pathlib import Path

from gaisnet.deployment.launcher import FINAL, Launcher, ProcessPlan
from gaisnet.deployment.site import CLOUD, START_LOCK, claimed, read_site
from gaisnet.engines.nvflare.kit import client_command, server_command
from gaisnet.errors import ConfigError

_LOOK_S = 1.0
_NVFLARE_GRACE_S = 1.0  # its parents leave at once, its job processes take many seconds: these are killed


def plans(folder: Path, logs: Path, out: Path | None = None, more: Sequence[str] = ()) -> list[ProcessPlan]:
    """The processes of one site. Raises ``KitUnreadable``.

    Args:
        folder: Its kit.
        logs: Where their logs go.
        out: The cloud's output folder.
        more: Further arguments of the process that stays.
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
    return [ProcessPlan(name, tuple(engine), logs / f"{name}.log", grace_s=_NVFLARE_GRACE_S), resident]


def start_site(folder: Path, out: Path | None = None, stay: bool = False, serve: int | None = None) -> None:
    """Run a site until the cloud's run has finished, or the process is ended. Raises ``GaisnetError``.

    Args:
        folder: Its kit.
        out: A cloud's output folder.
        stay: A cloud goes on answering when the run has finished.
        serve: Port at which a device answers callers.
    """
    site = read_site(folder)
    for given, role in ((stay, CLOUD), (serve is not None, "device")):
        if given and site.role != role:
            option = "--stay" if role == CLOUD else "--serve"
            raise ConfigError(f"{option} at '{site.name}'", f"the kit's role is {site.role}", f"give it to a {role}")
    more = [*(["--stay"] if stay else []), *(["--serve", str(serve)] if serve is not None else [])]
    with claimed(folder, START_LOCK), Launcher(plans(folder, folder / "logs", out, more)) as launcher:
        while not launcher.wait(site.name, _LOOK_S):
            pass
