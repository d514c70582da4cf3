"""Files that are whole or absent: written under a temporary name, synced, renamed; and stores of such files.

A checkpoint is a safetensors file: tensors, and a state of plain values as JSON in its metadata. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gaisnet.errors import CheckpointError, CheckpointVersion, GaisnetError, OutputNotWritable

CHECKPOINT_VERSION = "1"
"""Format of checkpoints; raised with every change that an older release would misread."""
_HEADER = "checkpoint"
"""The metadata's only entry: safetensors writes several in any order, and equal states are equal files."""


class CheckpointStore(Protocol):
    """Storage for a site's state across restarts."""

    def save(self, name: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint ``name``. Raises ``OutputNotWritable``; the old one then stays."""

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return the checkpoint ``name``; None if there is none. Raises ``CheckpointError``."""

    def clear_arrivals(self) -> None:
        """Delete received chunks, once their message is saved as a whole. Raises ``OutputNotWritable``."""


class FolderStore:
    """Checkpoints as files of one folder, ``<name>.safetensors``.

    Attributes:
        arrivals: A folder for received chunks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.arrivals = folder / "arriving"

    def save(self, name: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """See ``CheckpointStore.save``."""
        path = self._path(name)
        with writing(path):
            self._folder.mkdir(parents=True, exist_ok=True)
        metadata = {_HEADER: json.dumps({"version": CHECKPOINT_VERSION, "state": state}, allow_nan=False)}
        own = _apart(tensors)
        with replacing(path) as temporary:
            safetensors.torch.save_file(own, temporary, metadata)

    def load(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """See ``CheckpointStore.load``."""
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata().get(_HEADER, '{"version": "0"}'))  # the first releases wrote none
                if header["version"] != CHECKPOINT_VERSION:
                    raise CheckpointVersion(path, str(header["version"])[:20], CHECKPOINT_VERSION)
                return header["state"], {key: file.get_tensor(key) for key in file.keys()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(path, str(error)) from error

    def clear_arrivals(self) -> None:
        """See ``CheckpointStore.clear_arrivals``."""
        with writing(self.arrivals):
            if self.arrivals.is_dir():
                shutil.rmtree(self.arrivals)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


class NullStore:
    """A store that keeps nothing: for a site whose whole state another one can restore."""

    def save(self, name: str, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Drop it."""

    def load(self, name: str) -> None:
        """Return None."""

    def clear_arrivals(self) -> None:
        """Do nothing."""


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU, and apart if they share memory, which safetensors would refuse."""
    own, seen = dict[str, Tensor](), set[int]()
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        own[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the items whose names begin with ``prefix``, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over names, dtypes, shapes and numbers, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def writing(path: Path, refusal: Callable[[Path, str], GaisnetError] = OutputNotWritable) -> Iterator[None]:
    """Turn a disk error inside the block into ``refusal`` for ``path``."""
    try:
        yield
    except SafetensorError as error:  # its I/O errors are no OSError
        raise refusal(path, str(error)) from error
    except OSError as error:
        raise refusal(path, error.strerror or str(error)) from error


def make_room_for(path: Path, refusal: Callable[[Path, str], GaisnetError] = OutputNotWritable) -> None:
    """Make the folder of ``path``, and check that a file can be written there, before long work.

    Raises ``refusal``.
    """
    with writing(path, refusal):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write to; after the block it is synced and moved to ``path``.

    A reader, or a crash at any moment, sees the old file or the new one whole. Raises ``OutputNotWritable``; the old
    file then stays.
    """
    temporary = _beside(path)
    with writing(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(path.parent)  # the rename is an entry of the folder, not of the file


@contextmanager
def replacing_folder(folder: Path, refusal: Callable[[Path, str], GaisnetError] = OutputNotWritable) -> Iterator[Path]:
    """Yield a new folder to write files to; after the block they are synced and moved to ``folder``.

    Nothing is moved before all of them are on the disk: a full disk leaves ``folder`` unchanged, or absent. Each
    file replaces the one of its name, others stay. Raises ``refusal``.
    """
    scratch = _beside(folder)
    with writing(folder, refusal):
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that had our number, and died
        scratch.mkdir(parents=True)
        try:
            yield scratch
            files = [path for path in sorted(scratch.rglob("*")) if path.is_file()]
            for path in files:
                _sync(path)
            _move(scratch, files, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _sync(folder.parent)


def _move(scratch: Path, files: Sequence[Path], folder: Path) -> None:
    """Move in one step if ``folder`` is absent or empty; otherwise file by file."""
    with suppress(OSError):
        scratch.replace(folder)
        return
    for path in files:
        target = folder / path.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    _sync(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically, as ``replacing`` says."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def append_text(path: Path, text: str) -> None:
    """Append ``text`` to a file, all of it or nothing. Raises ``OutputNotWritable``."""
    with writing(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        content = text.encode("utf-8")
        try:
            if file.write(content) < len(content):  # the last block of a disk can be smaller than a line
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically, as ``replacing`` says."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
