"""Locks of real processes: one has it, a dead one has it no longer, and a file alone means nothing."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

from gaisnet import locks
from gaisnet.errors import LockTaken, NoLocks, OutputInUse
from gaisnet.locks import LockOwner, holder_of, is_remote, locked, take
from gaisnet.runs.output import CHECKPOINT_NAME, LOCK_NAME, RunFolder

TAKE = """
import sys
from pathlib import Path
from gaisnet.errors import LockTaken
from gaisnet.locks import take
print("ready", flush=True)
sys.stdin.readline()
try:
    lock = take(Path(sys.argv[1]))
except LockTaken as error:
    print(error.found, flush=True)
else:
    print("taken", flush=True)
sys.stdin.readline()
"""


class Taker:
    """A process that tries to take a lock when it is told to, and keeps it until it is killed."""

    def __init__(self, path: Path) -> None:
        command = [sys.executable, "-c", TAKE, str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said()

    def said(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that could go on."""
    (tmp_path / "out" / CHECKPOINT_NAME).mkdir(parents=True)
    return tmp_path / "out"


@pytest.fixture
def takers(run: Path) -> Iterator[list[Taker]]:
    """Processes that want the folder of the run."""
    started = [Taker(run / LOCK_NAME) for _ in range(4)]
    yield started
    for taker in started:
        taker.kill()


def test_of_processes_that_race_for_a_run_exactly_one_gets_it_also_after_a_death(
    run: Path, takers: list[Taker]
) -> None:
    (run / LOCK_NAME).write_text("999999\n", encoding="ascii")  # left by a dead one, as earlier versions left it
    for taker in takers:
        taker.tell()
    said = [taker.said() for taker in takers]
    winner = takers[said.index("taken")]
    pid, host = winner.process.pid, socket.gethostname()
    refused = [line for line in said if line.startswith(f"is taken by process {pid} on host '{host}', since 20")]
    unnamed = [line for line in said if "has not said its name yet" in line]  # it had it, and was about to say so
    assert sorted(said) == sorted(["taken", *refused, *unnamed])
    with pytest.raises(OutputInUse, match=f"process {pid} on host"):
        RunFolder.resume(run)
    winner.kill()
    with RunFolder.resume(run):  # at once: the kernel freed it
        assert holder_of(run / LOCK_NAME) == LockOwner.model_validate_json(
            (run / LOCK_NAME).read_text(encoding="utf-8")
        )
    assert not (run / LOCK_NAME).exists()


@pytest.mark.parametrize("content", ["999999\n", "1\n", "", None])
def test_whatever_stands_in_the_file_the_process_that_has_the_lock_keeps_it(run: Path, content: str | None) -> None:
    """In another container the number of a live process is that of a dead one, or of somebody else."""
    path = run / LOCK_NAME
    with RunFolder.resume(run):
        said = path.read_text(encoding="utf-8")
        path.write_text(said if content is None else content, encoding="utf-8")
        taker = Taker(path)
        taker.tell()
        assert taker.said() != "taken"
        taker.kill()
        path.write_text(said, encoding="utf-8")


def test_a_process_that_is_started_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = take(tmp_path / "lock")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    lock.release()
    take(tmp_path / "lock").release()
    child.communicate(b"\n")


def test_a_lock_is_had_once_in_a_process_too_and_can_be_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as lock:
        assert not lock.was_left
        with pytest.raises(LockTaken, match=rf"process {os.getpid()} on host .*; wait until that process ends"):
            take(path, wait_s=0.01)
    with locked(path, wait_s=-1):
        pass
    lock.release()  # twice is harmless
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_released_where_its_folder_has_gone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with locked(tmp_path / "folder" / "lock"):
        (tmp_path / "folder").rename(tmp_path / "moved")
    take(tmp_path / "moved" / "lock").release()


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(NoLocks, match=r"has no locks \(No locks available\); use a folder on a local disk"):
        RunFolder.create(tmp_path)


MOUNTS = """21 1 254:0 / / rw,relatime - ext4 /dev/root rw
30 21 0:40 / {shared} rw,relatime shared:4 - {kind} server:/export rw
31 21 0:41 / /sys rw - sysfs sysfs rw
"""


@pytest.mark.parametrize(
    ("kind", "host", "boot", "refused"),
    [
        ("nfs4", "elsewhere", "another", True),
        ("fuse.sshfs", "elsewhere", "", True),
        ("nfs4", "", "another", False),  # this host, before it was started again
        ("nfs4", "elsewhere", "this", False),  # another container under the same kernel
        ("xfs", "elsewhere", "another", False),  # a disk that was moved, or a folder that was copied
    ],
)
def test_a_run_that_another_host_left_is_refused_only_where_its_locks_may_not_be_seen(
    run: Path, monkeypatch: pytest.MonkeyPatch, kind: str, host: str, boot: str, refused: bool
) -> None:
    (run.parent / "mounts").write_text(MOUNTS.format(shared=run.parent, kind=kind), encoding="utf-8")
    monkeypatch.setattr(locks, "_MOUNTS", run.parent / "mounts")
    assert is_remote(run) is (kind != "xfs") and not is_remote(Path("/usr"))
    this = LockOwner.this()
    update = {"pid": 7, "host": host or this.host, "boot": this.boot if boot == "this" else boot}
    (run / LOCK_NAME).write_text(this.model_copy(update=update).model_dump_json(), encoding="utf-8")
    if refused:
        with pytest.raises(OutputInUse, match=r"process 7 on host 'elsewhere'.*nobody here can tell.*remove '.*lock'"):
            RunFolder.resume(run)
        (run / LOCK_NAME).unlink()
    RunFolder.resume(run).close()
