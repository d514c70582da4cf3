"""``gaisnet serve`` and ``gaisnet chat``: they teach, talk, and show who wrote."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from gaisnet.cli import serve as serving
from gaisnet.cli.app import app
from gaisnet.config import FrontSettings, RoutingSettings
from gaisnet.serving.generation.calibration import FILE_NAME, CalibrationExample
from gaisnet.serving.generation.device import AnsweringDevice, ServedDomain
from gaisnet.serving.http.address import ADDRESS_NAME, publish_address
from gaisnet.serving.http.callers import ApiKeys
from gaisnet.serving.http.server import Server
from tests.serving.models import prompt
from tests.serving.servers import RunningServer, chat_tokenizer, running_server, tiny_bodies, until


def gaisnet(*arguments: object, said: str = "") -> Result:
    environment = {"COLUMNS": "120", "TERM": "dumb", "GAISNET_API_KEYS": ""}
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=said, env=environment)


def words(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


@contextmanager
def tiny_device(run: Path, name: str | None, overrides: Sequence[str] = ()) -> Iterator[AnsweringDevice]:
    parts, bodies = tiny_bodies()
    held_out = [CalibrationExample(tuple(prompt(7, seed=i)), (5, 257)) for i in range(3)]
    domains = {
        name: ServedDomain(("relay", "domain"), (name,), held_out if name == "shapes" else ()) for name in bodies.edges
    }
    with ExitStack() as stack:
        for service in bodies.services:
            stack.enter_context(service.serving())
        yield AnsweringDevice("shapes", parts, chat_tokenizer(), bodies, domains, front=FrontSettings(max_prompts=1))


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "open_device", tiny_device)


@pytest.fixture(scope="module")
def up() -> Iterator[RunningServer]:
    with running_server(threshold=0.0) as at:
        yield at


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        (
            "serve",
            [
                "/v1/chat/completions",
                "calibration.json",
                "--api-keys",
                "curl",
                "where the DM is unsure",
                "0.0.0.0",
                "--set",
            ],
        ),
        ("chat", ["Green", "magenta", "--plain", "Diagnosis:", "RUN|URL", "--model"]),
    ],
)
def test_help_teaches(command: str, taught: list[str]) -> None:
    result = gaisnet(command, "--help")
    assert result.exit_code == 0
    assert [word for word in taught if word not in words(result.output)] == []


def test_serving_beyond_this_machine_needs_keys(tmp_path: Path) -> None:
    result = gaisnet("serve", tmp_path, "--host", "0.0.0.0")
    assert result.exit_code == 1
    assert "others reach it and no API keys are given" in words(result.output)


@pytest.mark.usefixtures("opens")
def test_serve_calibrates_once_and_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(server: Server) -> None:
        url = (tmp_path / ADDRESS_NAME).read_text(encoding="utf-8").splitlines()[0]
        seen.append(url)
        with server.in_thread():
            seen.append(httpx.get(f"{url}/v1/models").json()["data"][0]["id"])

    plain_run = Server.run

    def run_once(server: Server) -> None:
        plain_run(server) if threading.current_thread().name == "server" else run(server)

    monkeypatch.setattr(Server, "run", run_once)
    result = gaisnet("serve", tmp_path, "--port", 0)
    assert result.exit_code == 0, result.output
    assert f"at {seen[0]}/v1; end it with Ctrl-C" in words(result.output)
    assert seen[1] == "auto"
    assert not (tmp_path / ADDRESS_NAME).exists()
    kept = (tmp_path / FILE_NAME).read_text(encoding="utf-8")
    assert '"num_trials": 3' in kept
    assert "calibrate" in words(result.output)
    again = gaisnet("serve", tmp_path, "--port", 0)
    assert "calibrate" not in words(again.output)
    assert (tmp_path / FILE_NAME).read_text(encoding="utf-8") == kept


def test_a_conversation(up: RunningServer) -> None:
    said = "hello\n/models\n/model foundation\nhello\n/model nobody\n/what\n/new\n/quit\n"
    result = gaisnet("chat", up.url, "--max-tokens", 6, said=said)
    text = words(result.output)
    assert result.exit_code == 0, result.output
    assert "by the domain model" in text
    assert "auto, foundation, merged, shapes, tastes" in text
    assert "by the foundation model" in text
    assert "it has no model 'nobody'" in text
    assert "/quit ends it" in text


def test_plain_lines_are_prompts(up: RunningServer) -> None:
    result = gaisnet("chat", f"{up.url}/v1", "--model", "tastes", "--plain", "--max-tokens", 4, said="sweet\\n:\n")
    asked: dict[str, Any] = {"model": "tastes", "prompt": "sweet\n:", "max_tokens": 4, "temperature": 0}
    expected = httpx.post(f"{up.url}/v1/completions", json=asked).json()["choices"][0]["text"]
    assert words(expected) in words(result.output)


@pytest.mark.usefixtures("opens")
def test_a_run_that_nobody_serves_is_opened_here(tmp_path: Path) -> None:
    result = gaisnet("chat", tmp_path, "--speculate", "--max-tokens", 4, said="hello\n")
    assert result.exit_code == 0, result.output
    assert "drafted tokens taken in" in words(result.output)


def test_a_run_that_is_served_is_asked_there(tmp_path: Path, up: RunningServer) -> None:
    with publish_address(tmp_path, up.url):
        result = gaisnet("chat", tmp_path, "--model", "merged", "--max-tokens", 4, said="hello\n")
    assert "by the foundation model" in words(result.output)


def test_what_cannot_be_talked_to(up: RunningServer) -> None:
    nobody = gaisnet("chat", "http://127.0.0.1:9", said="hello\n")
    assert nobody.exit_code == 1
    assert "it cannot be reached" in words(nobody.output)
    unknown = gaisnet("chat", up.url, "--model", "nobody")
    assert "it has no model 'nobody', but auto, foundation" in words(unknown.output)


def test_an_answer_that_breaks_off_is_told_and_the_talk_goes_on(up: RunningServer) -> None:
    up.bodies.trouble = "lost", 3
    result = gaisnet("chat", up.url, "--max-tokens", 6, said="hello\n/models\n")
    up.bodies.trouble = None
    text = words(result.output)
    assert "cannot be had now" in text
    assert "auto, foundation" in text
    until(lambda: not up.bodies.num_sessions)


class Recorder(BaseHTTPRequestHandler):
    """Lists one model, sends every other request elsewhere, and keeps what it was sent."""

    seen: list[tuple[str, str | None]]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        body = b'{"data": [{"id": "auto"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(307)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def recorder() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    seen: list[tuple[str, str | None]] = []
    handler = type("Recorder", (Recorder,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_a_key_goes_to_an_address_that_the_user_names_and_never_to_one_of_a_file(
    tmp_path: Path, recorder: tuple[str, list[tuple[str, str | None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = recorder
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody is there, and nobody in between is to see it
    keys = tmp_path / "keys"
    keys.write_text("sk-of-the-tests-0123456789\n", encoding="utf-8")
    with publish_address(tmp_path, url):
        result = gaisnet("chat", tmp_path, "--api-keys", keys, said="hello\n")
    assert f"No API key is sent there; to send it: gaisnet chat {url}" in words(result.output)
    assert {key for _, key in seen} == {None}
    del seen[:]
    result = gaisnet("chat", url, "--api-keys", keys, said="hello\n")
    assert {key for _, key in seen} == {"Bearer sk-of-the-tests-0123456789"}
    assert [path for path, _ in seen] == ["/v1/models", "/v1/chat/completions"]  # a redirect is not followed
    assert "it answers 307" in words(result.output)


@pytest.mark.usefixtures("opens")
def test_a_run_s_own_limits_hold_where_it_is_served(tmp_path: Path) -> None:
    routing = RoutingSettings(escalate="never")
    with serving.opened(tmp_path, None, routing, False, ApiKeys(), ("127.0.0.1", 0)) as (_, server):
        with server.in_thread() as url:
            answer = httpx.post(f"{url}/v1/completions", json={"model": "auto", "prompt": ["a", "b"]})
    assert answer.status_code == 400
    assert "prompt holds 2 prompts, send 1 to 1" in answer.json()["error"]["message"]


def test_a_folder_that_names_a_foreign_address_is_not_believed(tmp_path: Path) -> None:
    with publish_address(tmp_path, "http://192.0.2.1:8000"):
        result = gaisnet("chat", tmp_path, said="hello\n")
    assert result.exit_code == 1
    assert "is no address of this machine" in words(result.output)
