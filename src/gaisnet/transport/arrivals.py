"""Incoming parcels, chunk by chunk; see ``transport.parcels``.

Memory is taken for received chunks, not for announced ones, and nothing of a parcel is used before it is complete.
"""

import hashlib
import mmap
import shutil
from pathlib import Path
from typing import Protocol

from gaisnet.checkpoint import writing
from gaisnet.errors import ChunkDamaged, OutputNotWritable, ParcelRefused, WireFormatError
from gaisnet.messages import LASTING, Chunk, Message, Parcel
from gaisnet.transport.codec import Codec
from gaisnet.transport.parcels import digest_of

_DIGEST_BYTES = hashlib.sha256().digest_size


class _Place(Protocol):
    """Storage for the chunks of a parcel until it is complete."""

    digests: list[bytes]
    """Digests of the stored chunks, which are the first ones."""

    def keep(self, data: memoryview, digest: bytes) -> None:
        """Store the next chunk."""

    def memory(self) -> mmap.mmap:
        """Return all of it as one buffer."""

    def drop(self) -> None:
        """Delete everything."""


class _InMemory:
    """Memory that grows as chunks arrive."""

    def __init__(self, offer: Parcel) -> None:
        self.digests: list[bytes] = []
        self._memory = mmap.mmap(-1, offer.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def keep(self, data: memoryview, digest: bytes) -> None:
        self._memory.write(data)
        self.digests.append(digest)

    def memory(self) -> mmap.mmap:
        return self._memory

    def drop(self) -> None:
        self._memory.close()


class _InFile:
    """A file that outlives the process, and one beside it with the digests of its chunks."""

    def __init__(self, folder: Path, offer: Parcel) -> None:
        self._path, self._notes = folder / f"{offer.digest}.part", folder / f"{offer.digest}.digests"
        self._size_bytes, self._chunk_bytes = offer.size_bytes, offer.chunk_bytes
        with writing(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            for other in set(folder.iterdir()) - {self._path, self._notes}:
                other.unlink()  # of a parcel that is no longer wanted
            self._path.touch()
            self._notes.touch()
            self.digests = self._whole_chunks()
            self._cut_off()
        self._check_room(folder)

    def keep(self, data: memoryview, digest: bytes) -> None:
        with writing(self._path):
            with self._path.open("ab") as file:
                file.write(data)
            with self._notes.open("ab") as notes:
                notes.write(digest)
        self.digests.append(digest)

    def memory(self) -> mmap.mmap:
        with writing(self._path), self._path.open("rb") as file:
            return mmap.mmap(file.fileno(), self._size_bytes, access=mmap.ACCESS_COPY)

    def drop(self) -> None:
        self._path.unlink(missing_ok=True)
        self._notes.unlink(missing_ok=True)

    def _whole_chunks(self) -> list[bytes]:
        """Return digests of the first chunks, as far as they are intact."""
        noted, digests = self._notes.read_bytes(), list[bytes]()
        with self._path.open("rb") as file:
            for start in range(0, len(noted), _DIGEST_BYTES):
                digest = noted[start : start + _DIGEST_BYTES]
                chunk = file.read(self._chunk_bytes)
                if not chunk or hashlib.sha256(chunk).digest() != digest:
                    break
                digests.append(digest)
        return digests

    def _cut_off(self) -> None:
        """Remove everything after the intact chunks."""
        with self._path.open("ab") as file, self._notes.open("ab") as notes:
            file.truncate(min(len(self.digests) * self._chunk_bytes, self._size_bytes))
            notes.truncate(len(self.digests) * _DIGEST_BYTES)

    def _check_room(self, folder: Path) -> None:
        lacking, free = self._size_bytes - self._path.stat().st_size, shutil.disk_usage(folder).free
        if lacking > free:
            raise OutputNotWritable(self._path, f"{lacking} bytes are to come, and {free} are free")


class Arriving:
    """A parcel that is arriving.

    Attributes:
        offer: The announcement.
    """

    def __init__(self, offer: Parcel, place: _Place, other: str) -> None:
        self.offer = offer
        self._place = place
        self._other = other

    @property
    def next(self) -> int:
        """Number of the first missing chunk, or of all chunks if none is missing."""
        return len(self._place.digests)

    def add_chunk(self, chunk: Chunk) -> None:
        """Add the next chunk. Raises ``ChunkDamaged``, ``WireFormatError`` or ``OutputNotWritable``."""
        offer, data = self.offer, chunk.data
        due = min(offer.chunk_bytes, offer.size_bytes - self.next * offer.chunk_bytes)
        if (chunk.digest, chunk.index, len(data)) != (offer.digest, self.next, due):
            found = f"chunk {chunk.index} of {len(data)} bytes where chunk {self.next} of {due} is due"
            raise WireFormatError(f"{found}, in a {offer.message} from '{self._other}'")
        digest = hashlib.sha256(data).digest()
        if digest.hex() != chunk.sha256:
            raise ChunkDamaged(self._other, offer.message, chunk.index, offer.num_chunks)
        self._place.keep(data, digest)

    def unwrap(self, codec: Codec) -> Message:
        """Return the message. Raises ``WireFormatError`` if chunks are missing, or do not match the announcement."""
        if self.next < self.offer.num_chunks:
            raise WireFormatError(f"a {self.offer.message} of which chunk {self.next} has not come")
        if digest_of(self._place.digests) != self.offer.digest:
            self._place.drop()
            raise WireFormatError(f"a {self.offer.message} from '{self._other}' that is not the one announced")
        message = codec.decode_long(self._place.memory())
        if type(message).__name__ != self.offer.message:
            raise WireFormatError(f"a {type(message).__name__} that was announced as a {self.offer.message}")
        return message


class Arrivals:
    """Incoming parcels from one other end.

    Args:
        codec: Codec with the limits.
        other: Name of the sender, for errors.
        folder: Folder for lasting messages: they continue there after a restart, until it is emptied. None keeps all in
            memory.
        most_bytes: Longest accepted parcel; None for ``wire.max_transfer_bytes``.
    """

    def __init__(self, codec: Codec, other: str, folder: Path | None = None, most_bytes: int | None = None) -> None:
        self._codec = codec
        self._other = other
        self._folder = folder
        self.most_bytes = min(codec.max_transfer_bytes, most_bytes or codec.max_transfer_bytes)

    def begin(self, offer: Parcel) -> Arriving:
        """Accept a parcel, or continue it. Raises ``ParcelRefused`` before memory is taken for any of it."""
        if offer.size_bytes > self.most_bytes:
            raise ParcelRefused(self._other, offer.message, f"{offer.size_bytes} bytes, the limit is {self.most_bytes}")
        if offer.chunk_bytes != self._codec.chunk_bytes:
            raise ParcelRefused(
                self._other, offer.message, f"chunks of {offer.chunk_bytes} bytes, here {self._codec.chunk_bytes}"
            )
        if self._folder is not None and offer.message in LASTING:
            return Arriving(offer, _InFile(self._folder, offer), self._other)
        try:
            return Arriving(offer, _InMemory(offer), self._other)
        except OSError as error:
            raise ParcelRefused(self._other, offer.message, f"{offer.size_bytes} bytes: {error.strerror}") from error
