import os
import sys
from functools import partial
from pathlib import Path

import pytest

from gaisnet.deployment.launcher import Launcher, ProcessPlan
from gaisnet.deployment.logs import rotate
from tests.deployment.test_launcher import until


def _is_small(file: Path) -> bool:
    return file.exists() and os.stat(file).st_size < 2**16


def test_a_full_log_is_put_aside_and_its_writer_goes_on_in_an_empty_one(tmp_path: Path) -> None:
    log = tmp_path / "site.log"
    with log.open("a", encoding="utf-8", buffering=1) as writer:
        for number in range(5):
            writer.write(f"line {number}\n" * 100)
            assert rotate(log, most_bytes=500, kept=2)
            assert log.read_text(encoding="utf-8") == ""
        writer.write("last\n")
        assert not rotate(log, most_bytes=500, kept=2)
    assert log.read_text(encoding="utf-8") == "last\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site.log", "site.log.1", "site.log.2"]
    assert (tmp_path / "site.log.1").read_text(encoding="utf-8").startswith("line 4\n")
    assert (tmp_path / "site.log.2").read_text(encoding="utf-8").startswith("line 3\n")


def test_a_log_that_is_not_there_yet_is_no_fault(tmp_path: Path) -> None:
    assert not rotate(tmp_path / "site.log")


def test_a_disk_that_is_full_does_not_keep_a_log_from_being_emptied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    log = tmp_path / "site.log"
    log.write_bytes(b"x" * 600)
    assert rotate(log, most_bytes=500)
    assert log.stat().st_size == 0


def test_a_launcher_keeps_what_its_processes_write_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gaisnet.deployment.launcher.rotate", lambda log: rotate(log, most_bytes=2**16, kept=1))
    monkeypatch.setattr("gaisnet.deployment.launcher._LOOK_AT_LOGS_S", 0.05)
    code = (
        "import sys, time\nwhile True:\n sys.stdout.write('x' * 99 + '\\n')\n open(sys.argv[1], 'a').write('y' * 99)\n"
    )
    log, own = tmp_path / "site.log", tmp_path / "own.log"
    plan = ProcessPlan("site", (sys.executable, "-S", "-c", code, str(own)), log, more_logs=(own,))
    with Launcher([plan]):
        for file in (log, own):
            assert until(Path(f"{file}.1").exists)
            assert until(partial(_is_small, file))
    assert not (tmp_path / "site.log.2").exists()
