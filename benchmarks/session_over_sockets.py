"""Tokens/s of one session whose every message crosses sockets, over those of ``generate`` on the model in one piece.

As between sites: the device dials its edge and the edge the cloud, with gRPC and mutual TLS, on loopback. All three are
in this process, so that they share one interpreter and the machine's cores; sites would have their own. The two ways
take turns, answer by answer. Run: python benchmarks/session_over_sockets.py RUN
"""

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # for both, as the command has it
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

from gaisnet.engines.body_hosting import LinkedBodies
from gaisnet.progress import silent
from gaisnet.research.bench.rounds import Effort, Rounds
from gaisnet.research.bench.sessions import single
from gaisnet.research.bench.writing import Writers, in_one_piece
from gaisnet.runs.answering_device import device_of
from gaisnet.runs.served_run import ServedRun, serve_run
from gaisnet.serving.engine.endpoint import SessionEndpoint
from gaisnet.serving.engine.escalation import EdgeSessions
from gaisnet.serving.generation.device import AnsweringDevice
from gaisnet.serving.generation.routing import Place, Target
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink, coded
from gaisnet.transport.grpc.dialer import Dialer
from gaisnet.transport.grpc.listener import Listener
from gaisnet.transport.ledger import Direction, Ledger, LinkKind

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.transport.certificates import Authority


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", type=Path, help="folder of a finished run")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--prompts", type=int, default=4, help="answers per round")
    arguments.add_argument("--tokens", type=int, default=64, help="of each answer")
    chosen = arguments.parse_args()
    effort = Effort(chosen.rounds, chosen.prompts, chosen.tokens)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        served = stack.enter_context(serve_run(chosen.run))
        device = device_of(served, None)
        writers = Writers(device.parts, over_sockets(served, device, Authority(Path(folder)), stack))
        write(f"{'body':>6} {'split /s':>9} {'whole /s':>9} {'ratio, of rounds':>21} {'the same answers':>19}")
        for place in ("edge", "cloud"):
            write(row(served, device, writers, place, effort))


def over_sockets(served: ServedRun, device: AnsweringDevice, authority: Authority, stack: ExitStack) -> LinkedBodies:
    """The bodies of a served run behind a listener of the edge and one of the cloud."""
    bodies, config, domain, name = served.bodies, served.config, device.domain, "device"
    codec, ledger = Codec(config.wire), Ledger()

    def link(asker: str, answerer: str, handler: Handler, kind: LinkKind, direction: Direction) -> CodedLink:
        listener = Listener("localhost:0", authority.site(answerer), answerer, [asker], coded(handler, codec))
        stack.callback(listener.close)
        address = f"localhost:{listener.port}"
        dialer = Dialer(address, authority.site(asker), asker, answerer, lambda _asker, frame: frame)
        stack.callback(dialer.close)
        return CodedLink(dialer, codec, ledger, kind, direction)

    of_edge = SessionEndpoint(bodies.service("cloud", domain), "edge")
    cloud = link("edge", "cloud", of_edge, "edge_cloud", "up")
    of_device = EdgeSessions(bodies.service("edge", domain), cloud, name)
    return LinkedBodies({domain: link(name, "edge", of_device, "device_edge", "up")}, config.faults.step_deadline_s)


def row(served: ServedRun, device: AnsweringDevice, writers: Writers, place: Place, effort: Effort) -> str:
    """One line of the table."""
    domain = device.domains[device.domain]
    target = Target(place, domain.adapters if place == "edge" else (), device.domain)
    rounds = Rounds([each.prompt for each in domain.held_out], effort, silent)
    found = single(writers, target, in_one_piece(served, device, place), rounds, place)
    speeds = f"{found.split.median:9.1f} {found.whole.median:9.1f} {found.ratio!s:>21}"
    return f"{place:>6} {speeds} {found.num_same:14} of {effort.rounds * effort.prompts}"


def write(line: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
