"""The same run on loopback and over slow links: every site in a network namespace of its own. Linux, as root.

    python benchmarks/wan.py configs/demo.yaml --out runs/wan --delay-ms 20 --mbit 10 --loss 0.01

What a site sends leaves it at the given rate, arrives after the delay, or, a packet in a hundred, not at all. That is
what ``tc netem`` does; it is done here by a process that carries IP packets between TUN devices, because not every
kernel has netem. Prints the seconds of every verb, and of an edge round, beside those of the same network on loopback.
"""

import argparse
import fcntl
import heapq
import json
import multiprocessing
import os
import random
import select
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gaisnet.config import Config
from gaisnet.config.file import load_config
from gaisnet.deployment.kits import prepare
from gaisnet.deployment.launcher import Launcher
from gaisnet.deployment.one_machine import run_network, sites_of
from gaisnet.deployment.site import CLOUD
from gaisnet.deployment.start import plans

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 1500
_QUEUE_S = 1.0  # of packets that wait at a sender; more are dropped, as a router would
_LOOK_S = 1.0


def main() -> None:
    """Parse the command line, run twice, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs")
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of a packet, one way")
    parser.add_argument("--mbit", type=float, default=10.0, help="Mbit/s that a site can send")
    parser.add_argument("--loss", type=float, default=0.01, help="share of packets that never arrive")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--loopback", type=Path, help="summary.json of a deployed run on loopback, if there is one")
    given = parser.parse_args()
    config = load_config(given.config, given.overrides)
    slow = run_slow(config, given.out / "slow", given.delay_ms / 1e3, given.mbit * 1e6 / 8, given.loss)
    if given.loopback:
        fast = json.loads(given.loopback.read_text(encoding="utf-8"))
    else:
        fast = run_network(config, given.out / "loopback").to_json()
    print_table(config, fast, slow)


def run_slow(config: Config, out: Path, delay_s: float, bytes_per_s: float, loss: float) -> Any:
    """The run's summary, after it went over slow links."""
    names = [CLOUD, *(edge.name for edge in config.edges), *(device.name for _, device in config.each_device())]
    with ExitStack() as made:
        hosts = {name: made.enter_context(_Host(number + 1)) for number, name in enumerate(names)}
        wires = multiprocessing.Process(
            target=carry, args=([host.tun for host in hosts.values()], delay_s, bytes_per_s, loss), daemon=True
        )
        wires.start()
        made.callback(wires.kill)
        kits = prepare(_addressed(config, hosts), sites_of(out))
        logs = sites_of(out) / "logs"
        every = [
            replace(plan, command=("ip", "netns", "exec", hosts[name].namespace, *plan.command))
            for name, kit in kits.items()
            for plan in plans(kit, logs, out)
        ]
        with Launcher(every) as launcher:
            while not launcher.wait(CLOUD, _LOOK_S):
                pass
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def _addressed(config: Config, hosts: "dict[str, _Host]") -> Config:
    edges = tuple(edge.model_copy(update={"host": hosts[edge.name].address}) for edge in config.edges)
    cloud = config.cloud.model_copy(update={"host": hosts[CLOUD].address})
    return config.model_copy(update={"cloud": cloud, "edges": edges})


class _Host:
    """A network namespace with one interface, whose other side is the file ``tun``."""

    def __init__(self, number: int) -> None:
        self.namespace = f"gaisnet-{os.getpid()}-{number}"
        self.address = f"10.77.0.{number}"
        self._device = f"gn{number}"
        self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)

    def __enter__(self) -> "_Host":
        fcntl.ioctl(self.tun, _TUNSETIFF, struct.pack("16sH", self._device.encode(), _IFF_TUN | _IFF_NO_PI))
        _ip("netns", "add", self.namespace)
        _ip("link", "set", self._device, "netns", self.namespace)
        inside = ("-n", self.namespace)
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "addr", "add", f"{self.address}/24", "dev", self._device)
        _ip(*inside, "link", "set", self._device, "mtu", str(_MTU), "up")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.tun)
        _ip("netns", "del", self.namespace)


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True)


def carry(tuns: Sequence[int], delay_s: float, bytes_per_s: float, loss: float) -> None:
    """Take packets out of every interface and put them into the one that they are addressed to, until killed.

    The interface of address 10.77.0.N is ``tuns[N - 1]``.
    """
    rng = random.Random(0)
    free_at = dict.fromkeys(tuns, 0.0)  # when a sender has sent all that it has
    under_way: list[tuple[float, int, int, bytes]] = []  # arrival, order, where, packet
    order = 0
    while True:
        now = time.monotonic()
        while under_way and under_way[0][0] <= now:
            _, _, target, packet = heapq.heappop(under_way)
            try:
                os.write(target, packet)
            except OSError:
                pass  # its queue is full, or it is down: the packet is lost
        pause = min(0.05, max(0.0, under_way[0][0] - now)) if under_way else 0.05
        for source in select.select(tuns, [], [], pause)[0]:
            packet = os.read(source, 2 * _MTU)
            now = time.monotonic()
            target = packet[19] - 1 if len(packet) >= 20 and packet[0] >> 4 == 4 else -1
            if not 0 <= target < len(tuns) or rng.random() < loss or free_at[source] > now + _QUEUE_S:
                continue
            free_at[source] = max(now, free_at[source]) + len(packet) / bytes_per_s
            order += 1
            heapq.heappush(under_way, (free_at[source] + delay_s, order, tuns[target], packet))


def print_table(config: Config, fast: Any, slow: Any) -> None:
    """Seconds of every cycle on both networks."""
    table = Table("cycle", "what", "loopback s", "slow links s", "accuracies equal")
    for one, other in zip(fast["cycles"], slow["cycles"], strict=True):
        equal = all(one[body] == other[body] for body in ("domain", "foundation", "merged"))
        for verb in ("release", "fine_tune", "absorb", "evaluate"):
            figures = (f"{entry['seconds'][verb]:.1f}" for entry in (one, other))
            table.add_row(str(one["cycle"]), verb, *figures, "yes" if equal else "no")
        rounds = config.fine_tune.edge_rounds
        per_round = (f"{entry['seconds']['fine_tune'] / rounds:.1f}" for entry in (one, other))
        table.add_row(str(one["cycle"]), "per edge round", *per_round, "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
