"""A whole network on this machine, every site a process of its own: to try it out, and to test it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from gaisnet.config import Config
from gaisnet.deployment.kits import prepare
from gaisnet.deployment.launcher import Launcher
from gaisnet.deployment.site import CLOUD, START_LOCK, certificates, claimed, read_site
from gaisnet.deployment.start import failure_recorded, plans
from gaisnet.errors import KitUnreadable, LinkError
from gaisnet.progress import Progress, silent
from gaisnet.runs.run import read_summary
from gaisnet.runs.summary import Summary
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.status import ask_status

Told = tuple[str, int, int, dict[str, float]]
"""Stage, steps done, of how many, figures; see ``gaisnet.progress.Progress``."""

_LOOK_S = 1.0
_ASK_S = 5.0


def run_network(config: Config, out: Path, progress: Progress = silent) -> Summary:
    """Prepare a whole network beside ``out``, run it on this machine, leave no process behind.

    Kits and logs are in ``<out>-sites``. Raises ``GaisnetError``.
    """
    sites = sites_of(out)
    progress("prepare", 0, 1, {})
    kits = prepare(config, sites)
    progress("prepare", 1, 1, {})
    return run_kits(kits, out, progress)


def resume_network(out: Path, progress: Progress = silent) -> Summary:
    """Go on with a network whose launcher was stopped. Raises ``GaisnetError``."""
    return run_kits(kits_in(sites_of(out)), out, progress)


def sites_of(out: Path) -> Path:
    """Return the folder of the kits of a run on one machine."""
    named = out if out.name else out.resolve()  # "." has no name
    return named.with_name(f"{named.name}-sites")


def kits_in(sites: Path) -> dict[str, Path]:
    """Return the kits in a folder, by site. Raises ``KitUnreadable`` if there is no cloud's."""
    found = {folder.name: folder for folder in sorted(sites.glob("*")) if (folder / "site.yaml").is_file()}
    if CLOUD not in found:
        raise KitUnreadable(sites, "there is no kit of a cloud in it")
    return found


def run_kits(kits: Mapping[str, Path], out: Path, progress: Progress) -> Summary:
    """Run all sites until the cloud has finished. Raises ``KitInUse`` before any is started."""
    logs = kits[CLOUD].parent / "logs"
    every = [plan for folder in kits.values() for plan in plans(folder, logs, out)]
    with ExitStack() as held:
        for folder in kits.values():
            held.enter_context(claimed(folder, START_LOCK))
        held.enter_context(failure_recorded(kits[CLOUD]))
        launcher = held.enter_context(Launcher(every))
        while not launcher.wait(CLOUD, _LOOK_S):
            _pass_on(kits[CLOUD], progress)
    return read_summary(out)


def _pass_on(kit: Path, progress: Progress) -> None:
    """Report the cloud's progress, or the edges' while it waits for them."""
    config, own = read_site(kit, CLOUD).config, certificates(kit, CLOUD)
    told = _told(config.cloud.link_port, CLOUD, own)
    if told is not None and told[0] == "fine_tune":
        edges = [_told(edge.link_port, edge.name, own) for edge in config.edges]
        told = _together([one for one in edges if one is not None and one[0] == "fine_tune"]) or told
    if told is not None:
        progress(*told)


def _told(port: int, name: str, own: Certificates) -> Told | None:
    """Return the progress of a site on this machine, if it can be asked now."""
    try:
        told = ask_status(f"localhost:{port}", own, name, _ASK_S)
    except LinkError:
        return None  # it is starting; if it never does, the launcher says so
    figures = told["figures"]
    numbers = {key: float(str(value)) for key, value in figures.items()} if isinstance(figures, dict) else {}
    return str(told["stage"]), int(str(told["done"])), int(str(told["total"])), numbers


def _together(edges: Sequence[Told]) -> Told | None:
    if not edges:
        return None
    losses = [figures["loss"] for _, _, _, figures in edges if "loss" in figures]
    figures = {"loss": sum(losses) / len(losses)} if losses else {}
    return "fine_tune", sum(done for _, done, _, _ in edges), sum(total for _, _, total, _ in edges), figures
