"""Runs one site on its own host."""

import sys
from pathlib import Path

from gaisnet.deployment.launcher import FINAL, Launcher, ProcessPlan
from gaisnet.deployment.site import CLOUD, read_site
from gaisnet.engines.nvflare.kit import client_command, server_command

_LOOK_S = 1.0
_NVFLARE_GRACE_S = 1.0  # its parents leave at once, its job processes take many seconds: these are killed


def plans(folder: Path, logs: Path, out: Path | None = None) -> list[ProcessPlan]:
    """The processes of one site; ``out`` is the cloud's output folder. Raises ``KitUnreadable``."""
    site = read_site(folder)
    folder = folder.resolve()
    more = ("--out", str(out.resolve())) if out and site.role == CLOUD else ()
    command = (sys.executable, "-m", "gaisnet.cli", site.role, str(folder), *more)
    resident = ProcessPlan(site.name, command, logs / f"{site.name}.log", may_finish=site.role == CLOUD, final=(FINAL,))
    if site.role == "device":
        return [resident]
    engine = server_command(folder) if site.role == CLOUD else client_command(folder, site.name)
    name = f"{site.name}-nvflare"
    return [ProcessPlan(name, tuple(engine), logs / f"{name}.log", grace_s=_NVFLARE_GRACE_S), resident]


def start_site(folder: Path, out: Path | None = None) -> None:
    """Run a site until the cloud's run has finished, or the process is ended. Raises ``GaisnetError``."""
    site = read_site(folder)
    with Launcher(plans(folder, folder / "logs", out)) as launcher:
        while not launcher.wait(site.name, _LOOK_S):
            pass
