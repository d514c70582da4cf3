"""Callers that hold connections, and a process that has no more files: others are answered meanwhile."""

import logging
import os
import resource
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from gaisnet.config import FrontSettings
from gaisnet.serving.http.callers import ApiKeys
from gaisnet.serving.http.server import Server

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads all and answers; a request for /endless gets more than it takes."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["path"] == "/endless":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 2**16, "more_body": True})
        return
    if scope["path"] != "/deaf":
        while (await receive()).get("more_body"):
            pass
    await JSONResponse({"path": scope["path"]})(scope, receive, send)


@contextmanager
def up(**limits: float) -> Iterator[tuple[str, int]]:
    settings = FrontSettings.model_validate(limits)
    with Server(app, "127.0.0.1", 0, ApiKeys(), settings=settings).in_thread() as url:
        yield url, int(url.rpartition(":")[2])


def connected(port: int, said: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(said)
    return connection


def is_ended(connection: socket.socket) -> bool:
    """Whether the server ends it within a minute; answers that come before are read away."""
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def answers(url: str) -> bool:
    return httpx.get(f"{url}/health", timeout=60).status_code == 200


@pytest.mark.parametrize("said", [b"", b"GET /health HT", HEAD + b"X-Slow: "], ids=["nothing", "a line", "a header"])
def test_a_head_that_does_not_end_is_not_waited_for(said: bytes) -> None:
    with up(head_timeout_s=0.3) as (url, port), connected(port, said) as connection:
        assert is_ended(connection)
        assert answers(url)


@pytest.mark.parametrize("path", [b"/", b"/deaf"], ids=["that is awaited", "that nobody reads"])
def test_a_body_that_does_not_end_is_not_waited_for(path: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.serving.http.server._GRACE_S", 0.1)
    head = b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n"
    with up(body_timeout_s=0.3) as (url, port), connected(port, head + b"{") as connection:
        assert is_ended(connection)
        assert answers(url)


def test_a_body_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.serving.http.server._GRACE_S", 0.1)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    with up(body_timeout_s=0.3) as (_, port), connected(port, head) as connection:
        with pytest.raises(ConnectionError):
            while True:
                connection.sendall(b"x")
                readable, _, _ = select.select([connection], [], [], 0.01)
                if readable and not connection.recv(2**16):
                    raise ConnectionResetError


def test_requests_on_one_connection_have_a_deadline_each() -> None:
    with up(head_timeout_s=1.0, body_timeout_s=1.0) as (_, port), connected(port) as connection:
        for _ in range(4):
            connection.sendall(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(2**16) or b"ended}"
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.4)  # longer than the deadline, all together; between requests none but uvicorn's own holds


def test_an_answer_that_nobody_takes_is_not_kept() -> None:
    with up(send_timeout_s=0.3) as (url, port):
        with connected(port, b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n") as connection:
            time.sleep(1.0)
            assert is_ended(connection)
        assert answers(url)


def test_one_connection_too_many_ends_the_one_that_waits_longest() -> None:
    with up(max_connections=4, head_timeout_s=600) as (url, port), ExitStack() as opened:
        idle = [opened.enter_context(connected(port, b"GET /health HT")) for _ in range(20)]
        assert answers(url)
        ended = [connection for connection in idle if select.select([connection], [], [], 1)[0]]
        assert len(ended) >= 16


def test_without_file_descriptors_connections_are_turned_away_and_one_line_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with up() as (url, port), ExitStack() as opened, caplog.at_level(logging.DEBUG):
        asking = opened.enter_context(httpx.Client())
        assert asking.get(f"{url}/health").status_code == 200
        waiting = [socket.socket() for _ in range(50)]  # made before there are no more
        for each in waiting:
            opened.callback(each.close)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 10, hard))
        try:
            with suppress(OSError):
                while True:
                    opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            for each in waiting:
                each.settimeout(60)
                each.connect(("127.0.0.1", port))
                assert is_ended(each)
            assert asking.get(f"{url}/health").status_code == 200  # on the connection that it has
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert answers(url)
    ours = [record for record in caplog.records if record.name.startswith("gaisnet")]
    lines = [record for record in ours if record.levelno >= logging.WARNING]
    assert [line.getMessage().partition(" (")[0] for line in lines] == ["connections are turned away"]
