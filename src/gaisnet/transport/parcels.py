"""Messages that are longer than a frame: they cross as parcels, in chunks, each of them checked, and none twice.

An end that has a long message offers a ``Parcel``, which says how long it is and what its digest is. A request is then
pushed: the other end says which chunk it lacks first, gets that and all after it, and is told to act. An answer is
pulled, chunk after chunk. ``transport.courier`` does both, and ``transport.arrivals`` takes what comes.

A chunk is cut out of the tensors when it is wanted, and within a tensor, too. The parcel's digest is SHA-256 over those
of its chunks, so that each chunk is hashed once where it comes in.
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
        offer: Announces it.
    """

    def __init__(self, name: str, packed: Packed, chunk_bytes: int, digests: tuple[bytes, ...]) -> None:
        self._packed = packed
        self._digests = digests
        self.offer = Parcel(name, digest_of(digests), packed.size_bytes, chunk_bytes)

    def chunk(self, index: int) -> Chunk:
        """One chunk. Raises ``UnexpectedMessage`` where there is none of this number."""
        if not 0 <= index < len(self._digests):
            raise UnexpectedMessage(f"a parcel of {len(self._digests)} chunks", f"request for chunk {index}")
        start = index * self.offer.chunk_bytes
        data = self._packed.cut(start, min(start + self.offer.chunk_bytes, self.offer.size_bytes))
        return Chunk.of(self.offer.digest, index, self._digests[index].hex(), data)


class Wrapper:
    """Makes parcels of messages. Those that last are hashed once, however many ends they go to."""

    def __init__(self, codec: Codec, other: str) -> None:
        self._codec = codec
        self._other = other
        self._known: dict[int, tuple[weakref.ref[Message], tuple[bytes, ...]]] = {}
        self._lock = threading.Lock()

    def hold(self, message: Message, packed: Packed) -> Packed:
        """Tensors for ``wrap`` that nobody changes: a copy, unless the message lasts. Raises ``MessageTooLarge``."""
        if packed.size_bytes > self._codec.max_transfer_bytes:
            raise MessageTooLarge(
                self._other, packed.size_bytes, self._codec.max_transfer_bytes, "wire.max_transfer_bytes"
            )
        return packed if type(message).__name__ in LASTING else packed.snapshot()

    def wrap(self, message: Message, packed: Packed) -> Outgoing:
        """A parcel of ``message``, of what ``hold`` gave."""
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
    """Digest of a parcel, out of those of its chunks."""
    return hashlib.sha256(b"".join(digests)).hexdigest()
