"""Who may ask, and where may be listened."""

from pathlib import Path

import pytest

from gaisnet.errors import ConfigError
from gaisnet.serving.http.callers import ENVIRONMENT, ApiKeys, check_bind, first_key, is_loopback, read_keys
from gaisnet.serving.http.server import Server

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}  # of the web site\n\nanother-long-key-of-ours\n", encoding="utf-8")
    keys = read_keys(path)
    assert [keys.admit(f"Bearer {key}") for key in (KEY, "another-long-key-of-ours", "# ours", "")] == [
        *(True, True),
        *(False, False),
    ]
    assert keys.admit(f"bearer {KEY}")
    assert not keys.admit(None)
    assert not keys.admit(KEY)
    assert first_key(path) == KEY


def test_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not read_keys(None)
    assert read_keys(None).admit(None)
    assert first_key(None) is None
    monkeypatch.setenv(ENVIRONMENT, f"{KEY}, {KEY}2,")
    assert read_keys(None).admit(f"Bearer {KEY}2")
    assert first_key(None) == KEY


@pytest.mark.parametrize(("content", "said"), [("short\n", "fewer than 16"), ("# none\n", "holds none")])
def test_files_that_are_no_keys(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=said) as raised:
        read_keys(path)
    assert "short" not in str(raised.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.1", "::1"])
def test_on_this_machine_nobody_needs_a_key(host: str) -> None:
    assert is_loopback(host)
    check_bind(host, ApiKeys())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "edge.example", ""])
def test_beyond_it_everybody_does(host: str) -> None:
    assert not is_loopback(host)
    check_bind(host, ApiKeys([KEY]))
    with pytest.raises(ConfigError, match="--api-keys"):
        check_bind(host, ApiKeys())


def test_an_address_that_is_taken() -> None:
    first = Server(None, "127.0.0.1", 0, ApiKeys())  # type: ignore[arg-type]
    port = int(first.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match="--port"):
        Server(None, "127.0.0.1", port, ApiKeys())  # type: ignore[arg-type]
    first._socket.close()
