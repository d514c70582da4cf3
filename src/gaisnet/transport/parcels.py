"""Parcels: messages longer than a frame, sent in chunks, each checked, none sent twice.

An end with a long message offers a ``Parcel``, which states length and digest. A request is then
pushed: the other end names the first chunk it lacks, receives that and all later ones, and is told to act. A reply is
pulled, chunk by chunk. ``transport.courier`` does both, and ``transport.arrivals`` stores arriving chunks.

A chunk is cut from the tensors on demand, within a tensor too. The parcel's digest is SHA-256 over those
of its chunks, so each chunk is hashed once where it arrives.
"""

import hashlib
import threading
import weakref
from collections.abc import Sequence

from gaisnet.errors import MessageTooLarge, UnexpectedMessage
from gaisnet.messages import LASTING, Chunk, Message, Parcel
from gaisnet.transport.codec import Codec
from gaisnet.transport.packed import Packed


class Outgoing:
    """A message that goes out in chunks.

    Attributes:
        offer: The announcement.
    """

    def __init__(self, name: str, packed: Packed, chunk_bytes: int, digests: tuple[bytes, ...]) -> None:
        self._packed = packed
        self._digests = digests
        self.offer = Parcel(name, digest_of(digests), packed.size_bytes, chunk_bytes)

    def chunk(self, index: int) -> Chunk:
        """Return one chunk. Raises ``UnexpectedMessage`` if there is none of this number."""
        if not 0 <= index < len(self._digests):
            raise UnexpectedMessage(f"a parcel of {len(self._digests)} chunks", f"request for chunk {index}")
        start = index * self.offer.chunk_bytes
        data = self._packed.cut(start, min(start + self.offer.chunk_bytes, self.offer.size_bytes))
        return Chunk.from_bytes(self.offer.digest, index, self._digests[index].hex(), data)


class Wrapper:
    """Makes parcels of messages. Lasting messages are hashed once, however many ends they go to."""

    def __init__(self, codec: Codec, other: str) -> None:
        self._codec = codec
        self._other = other
        self._known: dict[int, tuple[weakref.ref[Message], tuple[bytes, ...]]] = {}
        self._lock = threading.Lock()

    def hold(self, message: Message, packed: Packed) -> Packed:
        """Return tensors for ``wrap`` that do not change.

        Copies, unless the message lasts. Raises ``MessageTooLarge``.
        """
        if packed.size_bytes > self._codec.max_transfer_bytes:
            raise MessageTooLarge(
                self._other, packed.size_bytes, self._codec.max_transfer_bytes, "wire.max_transfer_bytes"
            )
        return packed if type(message).__name__ in LASTING else packed.snapshot()

    def wrap(self, message: Message, packed: Packed) -> Outgoing:
        """Return a parcel of ``message``, from the result of ``hold``."""
        name, chunk_bytes = type(message).__name__, self._codec.chunk_bytes
        lasts = name in LASTING
        digests = self._digests_of(message, packed) if lasts else _digests(packed, chunk_bytes)
        return Outgoing(name, packed, chunk_bytes, digests)

    def _digests_of(self, message: Message, packed: Packed) -> tuple[bytes, ...]:
        with self._lock:
            self._known = {key: kept for key, kept in self._known.items() if kept[0]() is not None}
            if id(message) not in self._known:
                self._known[id(message)] = weakref.ref(message), _digests(packed, self._codec.chunk_bytes)
            return self._known[id(message)][1]


def _digests(packed: Packed, chunk_bytes: int) -> tuple[bytes, ...]:
    cuts = range(0, packed.size_bytes, chunk_bytes)
    pieces = (packed.cut(start, min(start + chunk_bytes, packed.size_bytes)) for start in cuts)
    return tuple(hashlib.sha256(piece).digest() for piece in pieces)


def digest_of(digests: Sequence[bytes]) -> str:
    """Return a parcel's digest, from those of its chunks."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
