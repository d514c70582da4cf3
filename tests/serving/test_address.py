"""The file that says where something is served: true as long as its process lives, and believed little."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gaisnet.errors import ServerRefused
from gaisnet.serving.http.address import ADDRESS_NAME, publish_address, read_address

URL = "http://127.0.0.1:8000"
SERVES = textwrap.dedent(
    """
    import signal, sys, time
    from pathlib import Path
    from gaisnet.cli.serve import end_on_signals
    from gaisnet.serving.http.address import publish_address
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
    signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in sys.argv else signal.SIG_DFL)
    end_on_signals()
    try:
        with publish_address(Path(sys.argv[1]), "http://127.0.0.1:8000"):
            sys.stdout.write("up\\n")
            sys.stdout.flush()
            if len(sys.argv) > 2 and "nohup" not in sys.argv:
                raise RuntimeError(sys.argv[2])
            time.sleep(600)
    except KeyboardInterrupt:
        pass
    """
)


def test_it_is_there_as_long_as_something_is_served(tmp_path: Path) -> None:
    assert read_address(tmp_path) is None
    with publish_address(tmp_path, URL):
        assert read_address(tmp_path) == URL
        assert (tmp_path / ADDRESS_NAME).read_text(encoding="utf-8").splitlines()[0] == URL
    assert not (tmp_path / ADDRESS_NAME).exists()


def test_another_server_s_file_is_not_taken_away(tmp_path: Path) -> None:
    with publish_address(tmp_path, URL):
        (tmp_path / ADDRESS_NAME).write_text("http://127.0.0.1:9000\nelsewhere 1 2\n", encoding="utf-8")
    assert (tmp_path / ADDRESS_NAME).exists()


@pytest.mark.parametrize(
    ("served", "told"), [("http://0.0.0.0:80", "http://127.0.0.1:80"), ("http://[::]:80", "http://[::1]:80")]
)
def test_a_server_of_all_addresses_is_found_at_this_machine_s_own(tmp_path: Path, served: str, told: str) -> None:
    with publish_address(tmp_path, served):
        assert read_address(tmp_path) == told


@pytest.mark.parametrize(
    "url",
    [
        "http://192.168.1.5:8000",
        "http://evil.example:8000",
        "https://127.0.0.1:8000",
        "http://127.0.0.1:8000@evil.example:80",
        "http://user@127.0.0.1:8000",
        "http://127.0.0.1.evil.example:80",
        "http://127.0.0.1:8000/redirect?to=evil",
        "http://127.0.0.1",
        "file:///etc/passwd",
        "http://[::1",
        "",
    ],
)
def test_an_address_that_is_not_this_machine_s_own_is_refused(tmp_path: Path, url: str) -> None:
    with publish_address(tmp_path, URL):
        owner = (tmp_path / ADDRESS_NAME).read_text(encoding="utf-8").splitlines()[1]
    (tmp_path / ADDRESS_NAME).write_text(f"{url}\n{owner}\n", encoding="utf-8")
    with pytest.raises(ServerRefused, match="no address of this machine"):
        read_address(tmp_path)


@pytest.mark.parametrize("owner", ["", "x", "{host} {process} 1", "another-host {process} 1", "a b c d"])
def test_a_file_that_no_living_process_left_is_not_followed(tmp_path: Path, owner: str) -> None:
    owner = owner.format(host=socket.gethostname(), process=os.getpid())
    (tmp_path / ADDRESS_NAME).write_text(f"{URL}\n{owner}\n", encoding="utf-8")
    assert read_address(tmp_path) is None


@pytest.mark.parametrize("ends", ["SIGTERM", "SIGINT", "SIGHUP", "SIGKILL", "an exception"])
def test_it_ends_with_its_process_however_that_ends(tmp_path: Path, ends: str) -> None:
    fails = [ends] if ends == "an exception" else []
    command = [sys.executable, "-c", SERVES, str(tmp_path), *fails]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        if not fails:
            assert read_address(tmp_path) == URL
            process.send_signal(getattr(signal, ends))
        process.wait(60)
    assert read_address(tmp_path) is None
    assert (tmp_path / ADDRESS_NAME).exists() == (ends == "SIGKILL")


def test_under_nohup_it_outlives_its_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVES, str(tmp_path), "nohup"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGHUP)
        assert read_address(tmp_path) == URL
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    assert not (tmp_path / ADDRESS_NAME).exists()
