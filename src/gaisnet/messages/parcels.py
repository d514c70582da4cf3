"""Parcels: messages that carry a longer message in chunks."""

import re
from dataclasses import dataclass

import torch
from pydantic import StrictInt
from torch import Tensor

from gaisnet.messages.message import Message

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Parcel(Message):
    """Either end, in place of a message longer than a frame: it comes in chunks, see ``transport.parcels``."""

    message: str  # class of its message
    digest: str  # SHA-256 over the digests of the chunks, in hex
    size_bytes: StrictInt
    chunk_bytes: StrictInt  # of each but the last

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.digest) or self.size_bytes < 1 or self.chunk_bytes < 1:
            raise ValueError("a parcel needs a SHA-256 digest, and bytes in chunks")

    @property
    def num_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.size_bytes // self.chunk_bytes)


@dataclass(frozen=True)
class Wanted(Message):
    """Reply to an offered ``Parcel``: begin with this chunk; earlier ones are here."""

    chunk: StrictInt

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise ValueError("chunks are counted from 0")


@dataclass(frozen=True)
class ChunkRequest(Message):
    """Request for a chunk of a ``Parcel`` that was offered as a reply."""

    digest: str
    index: StrictInt


@dataclass(frozen=True)
class Chunk(Message):
    """A piece of a parcel."""

    digest: str  # of the parcel
    index: StrictInt
    sha256: str  # of the data, in hex
    data_B: Tensor  # uint8

    @classmethod
    def from_bytes(cls, digest: str, index: int, sha256: str, data: bytearray) -> "Chunk":
        """Make a chunk of these bytes."""
        return cls(digest, index, sha256, torch.frombuffer(data, dtype=torch.uint8))

    def __post_init__(self) -> None:
        if self.data_B.dtype != torch.uint8 or self.data_B.ndim != 1:
            raise ValueError("a chunk holds bytes")

    @property
    def data(self) -> memoryview:
        """Its bytes."""
        view: memoryview = self.data_B.numpy().data
        return view


@dataclass(frozen=True)
class ParcelSent(Message):
    """After the last chunk of a request: act on the message in the parcel, and reply to it."""

    digest: str


@dataclass(frozen=True)
class ParcelTaken(Message):
    """After the last chunk of a reply: the parcel has arrived, and need not be kept."""

    digest: str
