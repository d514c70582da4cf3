"""Kills sites of a deployed network at random moments, and looks whether the run comes to its end all the same.

    python benchmarks/faults.py configs/small.yaml --times 5

One run is left alone; its accuracies and its duration are what the others are held against. Then, for a device, an
edge and the cloud in turn, a network is started and one process of that role is ended by SIGKILL at a random moment
of the run (of an edge or the cloud, every second time together with its NVFlare process). A row says whether the run
finished, how far the accuracies are from those of the first run, and whether a process or a lock was left behind. A
moment that came after the end of its run has shown nothing: it counts as a failure, so run it again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gaisnet.deployment.one_machine import sites_of
from gaisnet.deployment.resident import end_in_order
from gaisnet.runs.output import LOCK_NAME

ROLES = ("device", "edge", "cloud")
_LOOK_S = 0.05
_START_S = 10.0  # from here on all sites are there, and some are still loading
_LATEST = 0.85  # of the undisturbed run: another one may be faster


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    killed: bool  # not if the run was faster than the one that was left alone
    finished: bool
    seconds: float
    accuracies: dict[str, float]
    losses: dict[str, float]
    left: list[str]  # processes and locks that should not be there
    faults: int  # devices that a round went on without


def main() -> None:
    """Parse the command line, run everything, print the table; leave with 1 if a run did not end well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--times", type=int, default=5, help="kills per role")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=ROLES)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--out", type=Path, help="keep the runs here; by default they are removed")
    given = parser.parse_args()
    end_in_order()  # a run that is under way ends, too
    with tempfile.TemporaryDirectory() as scratch:
        ok = kill_all(given.config, given.out or Path(scratch), given.roles, given.times, random.Random(given.seed))
    sys.exit(not ok)


def kill_all(config: Path, out: Path, roles: Sequence[str], times: int, rng: random.Random) -> bool:
    """Whether every run finished and left nothing behind."""
    console = Console(width=120)
    table = Table("killed", "after", "finished", "took", "accuracy moved by", "losses equal", "left out", "left behind")
    undisturbed = run(config, out / "undisturbed", 1e9, [])
    table.add_row("nothing", "", *_cells(undisturbed, undisturbed))
    ok = undisturbed.finished
    sites = {role: sorted(_sites(out / "undisturbed", role)) for role in roles}
    for number, role in ((number, role) for number in range(times) for role in roles):
        after_s = rng.uniform(_START_S, _LATEST * undisturbed.seconds)
        victim = rng.choice(sites[role])
        names = [victim, f"{victim}-nvflare"] if role != "device" and number % 2 else [victim]
        outcome = run(config, out / f"{role}-{number}", after_s, names)
        if outcome.finished and not outcome.left:
            shutil.rmtree(sites_of(out / f"{role}-{number}"))  # an edge's shelf has the size of a model
            ok = ok and outcome.killed
        else:
            ok = False
        moment = f"{after_s:.0f} s" if outcome.killed else "too late"
        table.add_row(" and ".join(names), moment, *_cells(outcome, undisturbed))
        console.print(f"{role} {number}: {outcome}", highlight=False)
    console.print(table)
    return ok


def run(config: Path, out: Path, after_s: float, names: Sequence[str]) -> Outcome:
    """One deployed run, in which the processes ``names`` are killed after some seconds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gaisnet.cli", "deploy", "run", str(config), "--out", str(out)]
    started, waiting = time.monotonic(), list(names)
    with (
        (out.parent / f"{out.name}.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as launch,
    ):
        try:
            while launch.poll() is None:
                if waiting and time.monotonic() - started > after_s:
                    waiting = [name for name in waiting if not _kill(out, name)]
                time.sleep(_LOOK_S)
        finally:
            launch.terminate()
    seconds = time.monotonic() - started
    left = [f"process {pid}" for pid, _ in _processes(out)] + [str(lock) for lock in out.rglob(LOCK_NAME)]
    summary = _summary(out)
    last = summary["cycles"][-1] if summary else {}
    scores = {
        f"{body} {domain}": score for body in ("domain", "foundation") for domain, score in last.get(body, {}).items()
    }
    accuracies, losses = ({name: one[figure] for name, one in scores.items()} for figure in ("accuracy", "loss"))
    faults = sum(len(cycle["faults"]) for cycle in summary["cycles"]) if summary else 0
    return Outcome(not waiting, launch.returncode == 0, seconds, accuracies, losses, left, faults)


def _cells(outcome: Outcome, undisturbed: Outcome) -> tuple[str, ...]:
    changes = [abs(value - undisturbed.accuracies.get(name, 0.0)) for name, value in outcome.accuracies.items()]
    same = outcome.losses == undisturbed.losses and outcome.losses != {}
    return (
        "yes" if outcome.finished else "NO",
        f"{outcome.seconds:.0f} s",
        f"{100 * max(changes, default=float('nan')):.1f} points",
        "to the last bit" if same else "no",
        str(outcome.faults),
        ", ".join(outcome.left) or "nothing",
    )


def _sites(out: Path, role: str) -> set[str]:
    """Names of the sites of a role in a network that was prepared."""
    kits = sites_of(out).glob("*/site.yaml")
    return {kit.parent.name for kit in kits if f"role: {role}\n" in kit.read_text(encoding="utf-8")}


def _kill(out: Path, name: str) -> bool:
    """Whether there was such a process."""
    site = name.removesuffix("-nvflare")
    kit = str(sites_of(out).resolve() / site)
    found = [
        pid
        for pid, words in _processes(out)
        if kit in words and ("nvflare" in " ".join(words)) == name.endswith("-nvflare")
    ]
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(found)


def _processes(out: Path) -> Iterator[tuple[int, list[str]]]:
    """Living processes whose command line names the kits of a run."""
    kits = str(sites_of(out).resolve())
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(word.startswith(kits) for word in words):
                yield int(entry.name), words


def _summary(out: Path) -> Any:
    path = out / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    main()
