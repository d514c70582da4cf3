"""Milliseconds of an echo over a link against a bare bidirectional gRPC stream, both with mutual TLS on loopback.

The end that answers is a process of its own. Link and bare stream take turns, and both are written with the synchronous
API of grpcio; the bare one carries a payload in one message and does nothing but send it back. Run:
python benchmarks/link_echo.py
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import grpc

from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.dialer import Dialer
from gaisnet.transport.grpc.listener import Listener

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.transport.certificates import Authority

SIZES = {"1 KiB": 2**10, "64 KiB": 2**16, "1 MiB": 2**20}
OPTIONS = [("grpc.max_receive_message_length", 2**21), ("grpc.max_send_message_length", 2**21)]
Echo = Callable[[bytes], bytes]


def answer(certificates: Certificates, pipe: Connection) -> None:
    """The process that echoes: a listener and a bare server, until the pipe says stop."""
    listener = Listener("localhost:0", certificates, "edge", ["device"], lambda _name, payload: payload)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=OPTIONS)
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(
        lambda requests, _context: requests
    )
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("Bare", {"Echo": handler})])
    root, certificate, key = certificates.read()
    credentials = grpc.ssl_server_credentials([(key, certificate)], root, require_client_auth=True)
    port = server.add_secure_port("localhost:0", credentials)
    server.start()
    pipe.send((listener.port, port))
    pipe.recv()
    listener.close()
    server.stop(0).wait(5)


def link_echo(stack: ExitStack, port: int, certificates: Certificates) -> Echo:
    """An echo through ``Dialer`` and ``Listener``."""
    dialer = Dialer(f"localhost:{port}", certificates, "device", "edge", lambda _name, payload: payload)
    stack.callback(dialer.close)
    return lambda payload: dialer.send(payload).result(60)


def bare_echo(stack: ExitStack, port: int, certificates: Certificates) -> Echo:
    """An echo through a stream of grpcio and nothing else."""
    root, certificate, key = certificates.read()
    credentials = grpc.ssl_channel_credentials(root, key, certificate)
    options = [*OPTIONS, ("grpc.ssl_target_name_override", "edge"), ("grpc.enable_http_proxy", 0)]
    channel = stack.enter_context(grpc.secure_channel(f"localhost:{port}", credentials, options))
    requests: SimpleQueue[bytes | None] = SimpleQueue()
    stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream("/Bare/Echo")
    answers: Iterator[bytes] = stream(iter(requests.get, None))
    stack.callback(requests.put, None)

    def echo(payload: bytes) -> bytes:
        requests.put(payload)
        return next(answers)

    return echo


def milliseconds(echo: Echo, payload: bytes, repeats: int) -> float:
    """Median of one echo."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        found = echo(payload)
        times.append(time.perf_counter() - started)
        assert len(found) == len(payload)
    return statistics.median(times) * 1000


def main() -> None:
    """Print a table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=11, help="turns of link and bare stream")
    arguments.add_argument("--repeats", type=int, default=100, help="echoes per turn")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        authority = Authority(Path(folder))
        here, there = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=answer, args=(authority.site("edge"), there))
        process.start()
        stack.callback(process.join, 10)
        stack.callback(here.send, "stop")
        ports = here.recv()
        ways = (
            link_echo(stack, ports[0], authority.site("device")),
            bare_echo(stack, ports[1], authority.site("device")),
        )
        write(f"{'payload':>8} {'link ms':>9} {'bare ms':>9} {'ratio':>6}  of single rounds")
        for name, size in SIZES.items():
            write(row(name, ways, bytes(size), chosen.rounds, chosen.repeats))


def row(name: str, ways: tuple[Echo, Echo], payload: bytes, rounds: int, repeats: int) -> str:
    """One line of the table: medians over the rounds, and the range of the rounds' ratios."""
    for echo in ways:
        milliseconds(echo, payload, repeats)
    pairs = [[milliseconds(echo, payload, repeats) for echo in ways] for _ in range(rounds)]
    link, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(pair[0] / pair[1] for pair in pairs)
    return f"{name:>8} {link:9.3f} {bare:9.3f} {statistics.median(ratios):6.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}"


def write(line: str) -> None:
    """To standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
