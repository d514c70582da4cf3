"""Text that others wrote reaches terminals and logs as text, and as nothing else."""

import io
import json
import logging
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from gaisnet.cli import display
from gaisnet.cli.app import app
from gaisnet.errors import PeerError
from gaisnet.terminal import SafeFormatter, safe, safe_line

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202eevil\u2069\U000e0041[bold red]markup[/]:smile:\ud800"
OBEYED = "\x1b\x07\x9b\r\x08\u202e\u2069\U000e0041\ud800"


def harmless(text: str) -> bool:
    return not any(character in text for character in OBEYED)


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_text_without_anything_to_obey_is_left_alone(text: str) -> None:
    shown = safe(text)
    assert {unicodedata.category(c) for c in shown if c not in "\n\t"}.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert safe(shown) == shown
    if text.isprintable():
        assert shown == text
    assert "\n" not in safe_line(text)


def test_letters_signs_and_emoji_are_kept() -> None:
    for text in ("naïve\ttext\nон 日本語 العربية", "👩\u200d👩\u200d👧\ufe0f", "a\u00a0b"):
        assert safe(text) == text
    assert safe("\x1b[31m\x9b\u202e\U000e0041") == "\\x1b[31m\\x9b\\u202e\\U000e0041"


def test_a_log_has_a_line_for_each_message_and_nothing_in_it_is_obeyed() -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(SafeFormatter("%(levelname)s %(message)s"))
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    logger.warning("device says: %s", f"{EVIL}\nERROR forged")
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("it failed")
    lines = log.getvalue().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["WARNING", "ERROR", "Traceback"]
    assert "\\nERROR forged" in lines[0]
    assert harmless(log.getvalue())


def test_errors_of_peers_are_told_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), display.told_errors():
        raise PeerError("north-a", "ValueError", EVIL)
    said = capsys.readouterr().err
    assert harmless(said)
    assert "[bold red]markup[/]:smile:" in said
    assert "\\x1b]0;owned" in said


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_as_text(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
        if terminal:
            monkeypatch.setenv(name, "1")
    with display.LiveProgress(display.safe_console()) as progress:
        progress(f"stage {EVIL}", 0, 2, {EVIL: 0.5})
        progress(f"stage {EVIL}", 2, 2, {EVIL: 0.5})
    said = capsys.readouterr().out
    assert said.count("[bold red]markup[/]") >= 2
    assert not any(evil in said for evil in ("\x1b]0", "\x9b", "\u202e"))


class _EvilServer(BaseHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._say(json.dumps({"data": [{"id": "auto"}, {"id": f"name {EVIL}"}]}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"text": EVIL, "delta": {"content": EVIL}}
        course = {"body": EVIL, "escalated_at": EVIL, "drafted": EVIL}
        self._say(f"data: {json.dumps({'choices': [choice], 'gaisnet': course})}\n\ndata: [DONE]\n\n")

    def _say(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())


def test_a_chat_shows_what_a_server_says_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (display.console, display._errors):
        monkeypatch.setattr(console, "_width", 400)  # an escape is longer than its character, and a line is cut
    server = ThreadingHTTPServer(("127.0.0.1", 0), _EvilServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        said = "/models\nhello\n/model nothing\n"
        result = CliRunner().invoke(app, ["chat", url, "--plain"], input=said, env={"TERM": "dumb"})
    finally:
        server.shutdown()
        server.server_close()
    assert result.exit_code == 0
    assert harmless(result.output.replace("\r\n", "\n"))
    assert "".join(result.output.split()).count("[boldred]markup[/]:smile:") >= 3  # wherever a line ends
