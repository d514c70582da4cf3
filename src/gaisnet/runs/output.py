"""A run's output folder: claimed by one run, written as the run proceeds, readable whenever the run stops.

Layout: ``summary.json``, ``metrics.jsonl``, ``report.html``, ``tensorboard/``, ``adapters/<name>/``, ``checkpoint/`` to
resume from; and ``.lock`` while a process has the folder (``gaisnet.locks``). Only the lock exists before the
first result, so a run that fails at once leaves an empty folder that the next one may take.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gaisnet.checkpoint import FolderStore, append_text, write_text, writing
from gaisnet.errors import GaisnetError, LockTaken, NothingToResume, OutputInUse, OutputNotWritable
from gaisnet.locks import Lock, take
from gaisnet.runs.summary import Cycle, Summary, strict_json, write_json

LOCK_NAME = ".lock"
CHECKPOINT_NAME = "checkpoint"
_FILES = ("summary.json", "metrics.jsonl", "report.html")
_FOLDERS = ("tensorboard", "adapters")
MIN_FREE_BYTES = 64 * 2**20
"""Bytes for adapters, events and the report of a small run; with less space, a run is refused before it starts."""


class RunFolder:
    """The output folder of one run, from ``create``; use it in a ``with`` block."""

    def __init__(self, path: Path, lock: Lock) -> None:
        """Wrap a folder that is already claimed."""
        self.path = path
        self._lock = lock
        self._events: Any = None  # the TensorBoard writer, opened with the first scalar
        self._purge_step: int | None = None

    @classmethod
    def create(cls, path: Path) -> Self:
        """Claim ``path``, with its parents.

        Raises:
            OutputInUse: It contains anything, or another process has it.
            OutputNotWritable: Nothing can be written to it.
            NoLocks: Its file system has no locks.
        """
        with writing(path):
            try:
                path.mkdir(parents=True, exist_ok=True)
            except FileExistsError:
                raise OutputInUse(path, "is a file, not a folder") from None
            if not (path / LOCK_NAME).exists():
                _refuse_contents(path)  # first without a lock of our own: the folder may be someone else's
            lock = _take_lock(path)
            with _released_on_error(lock):
                _refuse_contents(path)  # again: another run may have come and gone before our lock
                _refuse_full_disk(path)
            return cls(path, lock)

    @classmethod
    def resume(cls, path: Path) -> Self:
        """Claim a folder whose run was stopped, or has finished.

        Raises:
            OutputInUse: Another process has it.
            NothingToResume: No part of a run was finished in it.
            OutputNotWritable: Nothing can be written to it.
            NoLocks: Its file system has no locks.
        """
        with writing(path):
            if not (path / CHECKPOINT_NAME).is_dir():
                raise NothingToResume(path)
            return cls(path, _take_lock(path))

    @classmethod
    def claim(cls, path: Path) -> Self:
        """For a process that is started again until it has finished: go on if there is a checkpoint, or begin anew.

        The remains of a run that died before its first checkpoint are removed. Raises as ``create``.
        """
        if not ((path / LOCK_NAME).exists() or (path / CHECKPOINT_NAME).is_dir()):
            return cls.create(path)
        with writing(path):
            lock = _take_lock(path)
            with _released_on_error(lock):
                if not (path / CHECKPOINT_NAME).is_dir():
                    if lock.was_left:
                        _remove_remains(path)
                    _refuse_contents(path)
                    _refuse_full_disk(path)
            return cls(path, lock)

    @property
    def store(self) -> FolderStore:
        """Store of the run's checkpoints."""
        return FolderStore(self.path / CHECKPOINT_NAME)

    def metrics_bytes(self) -> int:
        """Present length of ``metrics.jsonl``."""
        return self.metrics_path.stat().st_size if self.metrics_path.exists() else 0

    def cut_metrics(self, size_bytes: int, step: int) -> None:
        """Remove everything logged after a checkpoint: lines beyond ``size_bytes``, curves from ``step`` on."""
        with writing(self.metrics_path):
            if self.metrics_bytes() > size_bytes:
                os.truncate(self.metrics_path, size_bytes)
        self._purge_step = step

    @property
    def summary_path(self) -> Path:
        """``summary.json``."""
        return self.path / "summary.json"

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``, an event per line."""
        return self.path / "metrics.jsonl"

    @property
    def report_path(self) -> Path:
        """``report.html``."""
        return self.path / "report.html"

    @property
    def adapters_dir(self) -> Path:
        """Folder of the adapters, one folder each; made when the first is saved."""
        return self.path / "adapters"

    @property
    def tensorboard_dir(self) -> Path:
        """Folder of the TensorBoard events; made with the first scalar."""
        return self.path / "tensorboard"

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line of strict JSON to ``metrics.jsonl``. Raises ``NotFinite`` or ``OutputNotWritable``."""
        line = strict_json(event, self.metrics_path.name)
        # Opened for each line: nothing stays in a buffer, and a full disk is met here and not at the end.
        append_text(self.metrics_path, line + "\n")

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to the TensorBoard curve ``tag``. Raises ``OutputNotWritable``."""
        with writing(self.tensorboard_dir):
            self._writer().add_scalar(tag, value, step)

    def log_cycle(self, cycle: Cycle) -> None:
        """Write a finished cycle to ``metrics.jsonl`` (``"event": "cycle"``) and to TensorBoard."""
        self.log({"event": "cycle", **cycle.model_dump(mode="json")})
        for tag, value in cycle_scalars(cycle).items():
            self.scalar(tag, value, cycle.cycle)
        with writing(self.tensorboard_dir):
            self._writer().flush()

    def write_summary(self, summary: Summary) -> None:
        """Write ``summary.json`` anew, atomically. Raises ``NotFinite`` or ``OutputNotWritable``."""
        write_json(self.summary_path, summary.to_json())

    def write_report(self, summary: Summary) -> None:
        """Write ``report.html`` anew, atomically. Raises ``OutputNotWritable``."""
        from gaisnet.runs.report import render_report  # matplotlib takes a while and is needed only at the end

        write_text(self.report_path, render_report(summary))

    def close(self, broken_off: bool = False) -> None:
        """Close the event file and release the lock; closing twice is harmless. Raises ``OutputNotWritable``.

        ``broken_off``: closed before the end; without a checkpoint, the lock's file then tells ``claim`` to begin anew.
        """
        events, self._events = self._events, None
        with writing(self.path):
            try:
                if events is not None:
                    events.close()
            finally:
                self._lock.release(keep_file=broken_off and self._has_remains())

    def _has_remains(self) -> bool:
        """Return whether there are remains of a run, and no checkpoint."""
        begun = any((self.path / name).exists() for name in (*_FILES, *_FOLDERS))
        return begun and not (self.path / CHECKPOINT_NAME).is_dir()

    def __enter__(self) -> Self:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; an error inside the block is never hidden by one of the closing."""
        if error is None:
            self.close()
        else:
            with suppress(GaisnetError):
                self.close(broken_off=True)

    def _writer(self) -> Any:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter  # keeps tensorboard out of every other command

            self._events = SummaryWriter(str(self.tensorboard_dir), flush_secs=10, purge_step=self._purge_step)
        return self._events


def cycle_scalars(cycle: Cycle) -> dict[str, float]:
    """Return the TensorBoard tags of a cycle with their values."""
    scalars: dict[str, float] = {}
    for body, scores in cycle.bodies().items():
        for domain, score in scores.items():
            scalars[f"accuracy/{body}/{domain}"] = score.accuracy
            scalars[f"loss/{body}/{domain}"] = score.loss
    costs = {"perplexity": cycle.retention.perplexity, "drift": cycle.retention.drift}
    scalars |= {f"retention/{tag}": value for tag, value in costs.items() if value is not None}
    scalars |= {f"retention/adapters/{name}": value for name, value in cycle.retention.adapters.items()}
    for link, traffic in (("device_edge", cycle.bytes.device_edge), ("edge_cloud", cycle.bytes.edge_cloud)):
        scalars |= {f"bytes/{link}/up": traffic.up, f"bytes/{link}/down": traffic.down}
    scalars |= {f"seconds/{verb}": value for verb, value in cycle.seconds.model_dump().items()}
    for domain, loss in cycle.relay.items():
        figures = {"before": loss.loss_before, "after": loss.loss_after, "kl": loss.kl_after}
        scalars |= {f"relay/{domain}/{tag}": value for tag, value in figures.items() if value is not None}
    return scalars


def _take_lock(folder: Path) -> Lock:
    """Take the folder's lock: one process gets it, others see ``OutputInUse``. Also proves that we may write."""
    try:
        return take(folder / LOCK_NAME)
    except LockTaken as error:
        raise OutputInUse(folder, error.found, error.do) from error


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder that is not a run's. Raises as ``RunFolder.resume``.

    An error inside the context is never hidden by one at its end.
    """
    with writing(folder):
        lock = _take_lock(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # the kernel frees it all the same
            lock.release()


@contextmanager
def _released_on_error(lock: Lock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.release(keep_file=lock.was_left)  # the sign that a run died here stays
        raise


def _remove_remains(folder: Path) -> None:
    """Remove everything that a run writes before its first checkpoint."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _refuse_contents(folder: Path) -> None:
    """Raise ``OutputInUse`` if anything but a lock is in ``folder``."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK_NAME)
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise OutputInUse(folder, f"is not empty, it holds '{names[0]}'{more}")


def _refuse_full_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        found = f"the disk has {free / 2**20:.1f} MiB free, a run needs at least {MIN_FREE_BYTES / 2**20:.0f} MiB"
        raise OutputNotWritable(folder, found)
