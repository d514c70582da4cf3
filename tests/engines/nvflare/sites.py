"""A small network for the tests: NVFlare's real processes, and listeners in this process for the residents."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gaisnet.deployment.launcher import Launcher, ProcessPlan, Restarts
from gaisnet.engines.nvflare.job import JobKeeper
from gaisnet.engines.nvflare.kit import ENVIRONMENT, ORDERS, client_command, read_kit, server_command
from gaisnet.engines.nvflare.provision import ADMIN, NetworkAddresses, SiteAddress, provision
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.listener import Listener
from gaisnet.transport.stream import ByteLink

EDGES = ("edge1", "edge2")
HELD = Restarts(most=20, within_s=60)
Handle = Callable[[str, bytes], bytes]


def free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("localhost", 0))) for _ in range(count)]
        return [opened.getsockname()[1] for opened in sockets]


def addresses() -> NetworkAddresses:
    nvflare, cloud, *edges = free_ports(2 + len(EDGES))
    return NetworkAddresses(
        name="test-net",
        cloud="cloud",
        cloud_address=SiteAddress("localhost", cloud),
        nvflare_port=nvflare,
        edges={name: SiteAddress("localhost", port) for name, port in zip(EDGES, edges, strict=True)},
        devices=["device11"],
    )


def listen(kit_folder: Path, accepts: list[str], handle: Handle) -> Listener:
    kit = read_kit(kit_folder)
    certificates = Certificates(kit.root, kit.certificate, kit.key)
    return Listener(f"localhost:{kit.link_port}", certificates, kit.site, accepts, handle)


@dataclass(frozen=True)
class Sites:
    kits: dict[str, Path]
    launcher: Launcher
    cloud: Listener

    @contextmanager
    def keeper(self, edges: tuple[str, ...] = EDGES) -> Iterator[JobKeeper]:
        keeper = JobKeeper(self.kits[ADMIN], edges)
        keeper.start()
        try:
            yield keeper
        finally:
            keeper.close()

    def link(self, edge: str) -> ByteLink:
        return self.cloud.link(ORDERS + edge)

    def life(self, edge: str) -> str:
        """Of the bridge that carries the edge's orders."""
        return self.cloud.states()[ORDERS + edge].incarnation

    def pid(self, name: str) -> int:
        found = self.launcher.states()[name].pid
        assert found is not None
        return found

    def connected(self) -> dict[str, bool]:
        return {name: state.connected for name, state in self.cloud.states().items()}


def plans(kits: dict[str, Path]) -> list[ProcessPlan]:
    commands = {"server": server_command(kits["cloud"]), **{name: client_command(kits[name], name) for name in EDGES}}
    folder = kits["cloud"].parent
    here = os.pathsep.join(
        [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    )  # a thief's server is there
    return [
        ProcessPlan(name, tuple(command), folder / f"{name}.log", environment={**ENVIRONMENT, "PYTHONPATH": here})
        for name, command in commands.items()
    ]


@contextmanager
def running(
    folder: Path,
    handles: dict[str, Handle],
    start: Sequence[str] = ("server", *EDGES),
    change: Callable[[dict[str, Path]], None] = lambda kits: None,
) -> Iterator[Sites]:
    """Residents that answer by ``handles`` and NVFlare's processes, without a job; ``change`` may alter the kits."""
    kits = provision(addresses(), folder)
    change(kits)
    with ExitStack() as stack:
        cloud = listen(kits["cloud"], [ORDERS + name for name in EDGES], lambda name, payload: b"")
        stack.callback(cloud.close)
        for name, handle in handles.items():
            stack.callback(listen(kits[name], [name], handle).close)
        launcher = Launcher([plan for plan in plans(kits) if plan.name in start], HELD)
        stack.callback(launcher.stop)
        launcher.start()
        yield Sites(kits, launcher, cloud)


def until(true: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()
