"""Locks on folders: the kernel holds them for a process, and frees them when it dies, however it dies.

A lock is an ``flock`` on a file. The file also names its owner for others: process, host, and start time. It
is removed when the lock is released, so a file without a lock was left by a process that died.
"""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gaisnet.errors import LockTaken, NoLocks

_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
_MOUNTS = Path("/proc/self/mountinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "beegfs", "glusterfs", "afs", "fuse.")


class LockOwner(BaseModel):
    """The process that holds a lock, or held it when it died."""

    model_config = ConfigDict(frozen=True)

    pid: int
    host: str = Field(max_length=255)
    boot: str = Field(
        max_length=64, description="Boot id of the kernel, which several containers share; '' where unknown."
    )
    since: datetime

    @classmethod
    def this(cls) -> Self:
        """Describe this process."""
        boot = _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else ""
        return cls(pid=os.getpid(), host=socket.gethostname(), boot=boot, since=datetime.now(UTC))

    @property
    def is_near(self) -> bool:
        """Return whether its locks and ours belong to the same kernel, or it ran on this host."""
        this = LockOwner.this()
        return self.host == this.host or bool(self.boot) and self.boot == this.boot

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host!r}, since {self.since.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


class Lock:
    """A lock that this process holds, from ``take``; call ``release`` in the end.

    Attributes:
        was_left: Whether an earlier process died with the lock.
    """

    def __init__(self, path: Path, flock: FileLock, was_left: bool) -> None:
        self._path = path
        self._flock = flock
        self._holder = LockOwner.this()
        self.was_left = was_left
        path.write_text(self._holder.model_dump_json() + "\n", encoding="utf-8")

    def release(self, keep_file: bool = False) -> None:
        """Free the lock, and remove its file unless it is to stay; a second call does nothing. Raises ``OSError``."""
        if not self._flock.is_locked:
            return
        try:
            if not keep_file and holder_of(self._path) == self._holder:  # someone may have replaced the file by hand
                self._path.unlink()  # while we hold it: a waiting process checks whether the file is still there
        finally:
            self._flock.release()


def take(path: Path, wait_s: float = 0.0) -> Lock:
    """Take the lock whose file is ``path``, in an existing folder.

    Args:
        path: The file; its content is replaced.
        wait_s: Seconds to wait for another process; -1 waits without end.

    Raises:
        LockTaken: Another process has it, or another thread of this one; or one had it on another host, and the file
            system cannot tell whether that process is alive.
        NoLocks: The file system has no locks.
        OSError: The file cannot be written.
    """
    flock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        flock.acquire(timeout=wait_s)
    except Timeout:
        raise LockTaken(path, holder_of(path)) from None
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoLocks(path, error.strerror or str(error)) from error
        raise
    try:
        _refuse_lost(path)
        return Lock(path, flock, path.stat().st_size > 0)
    except BaseException:
        flock.release()
        raise


def _refuse_lost(path: Path) -> None:
    """Raise ``LockTaken`` if the last owner is on another host that may not see our locks, nor we its."""
    left = holder_of(path)
    if left is not None and not left.is_near and is_remote(path):
        raise LockTaken(path, left, lost=True)


@contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[Lock]:
    """Hold the lock inside the context; arguments and errors as in ``take``."""
    lock = take(path, wait_s)
    try:
        yield lock
    finally:
        with suppress(OSError):  # the folder may have gone meanwhile; the kernel frees the lock all the same
            lock.release()


@contextmanager
def one_at_a_time(made: Path) -> Iterator[None]:
    """Keep other processes from making the same file or folder inside the context; they wait.

    Without locks they make it side by side, under different names; results are moved in place whole.
    Raises ``OSError`` if the folder of ``made`` cannot be written.
    """
    flock = FileLock(made.with_name(f".{made.name}.lock"), thread_local=False, fallback_to_soft=False)
    try:
        flock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    try:
        yield
    finally:
        if flock.is_locked:
            Path(flock.lock_file).unlink(missing_ok=True)  # while we hold it, as in ``Lock.release``
            flock.release()


def holder_of(path: Path) -> LockOwner | None:
    """Return the process that a lock's file names; None if it names none."""
    try:
        return LockOwner.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None


def is_remote(path: Path) -> bool:
    """Return whether a path is on a network file system, whose locks other hosts may not see."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    kinds: dict[str, str] = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        kinds[before.split()[4].replace("\\040", " ")] = after.split()[0]
    real = path.resolve()
    mount = next((str(folder) for folder in (real, *real.parents) if str(folder) in kinds), "")
    return kinds.get(mount, "").startswith(_NETWORK)
