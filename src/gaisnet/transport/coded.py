"""Links for messages on top of links for bytes: both ends encode and decode frames, and the asking end counts them."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from gaisnet.errors import LinkError, LinkLost
from gaisnet.futures import afterwards, aside, failed, map_result
from gaisnet.messages import Message, Parcel
from gaisnet.transport.arrivals import Arrivals
from gaisnet.transport.base import Handler
from gaisnet.transport.codec import Codec
from gaisnet.transport.courier import Courier, Depots
from gaisnet.transport.ledger import Direction, Ledger, LinkKind, opposite
from gaisnet.transport.packed import Packed
from gaisnet.transport.parcels import Wrapper
from gaisnet.transport.stream import ByteLink

_LOOK_S = 0.2
A = TypeVar("A")
GivenUp = Callable[[], bool]
"""Returns whether the reply has been given up."""


class CodedLink:
    """A link for messages on top of a link for bytes.

    Messages longer than a frame cross in chunks, see ``transport.parcels``.

    Args:
        bytes_link: Carries the frames.
        codec: Encodes and decodes them.
        ledger: Counts their bytes.
        kind: The tiers that the link joins.
        direction: Direction of requests; replies travel the other way.
        other: Name of the other end, for errors.
        folder: Folder for long, lasting replies while they arrive, see ``Arrivals``.
    """

    def __init__(
        self,
        bytes_link: ByteLink,
        codec: Codec,
        ledger: Ledger,
        kind: LinkKind,
        direction: Direction,
        other: str = "the other end",
        folder: Path | None = None,
    ) -> None:
        self._bytes_link = bytes_link
        self._codec = codec
        self._ledger = ledger
        self._kind: LinkKind = kind
        self._direction: Direction = direction
        self._other = other
        self._wrapper = Wrapper(codec, other)
        self._arrivals = Arrivals(codec, other, folder)
        self._lock = threading.RLock()
        self._last_pushed: Future[Message] | None = None

    @property
    def peer(self) -> str:
        """See ``Link.peer``."""
        return self._bytes_link.peer

    def send(self, message: Message) -> Future[Message]:
        """See ``Link.send``."""
        packed = self._codec.pack(message)
        is_long = packed.size_bytes > self._codec.frame_bytes
        try:
            begin = self._push(message, packed) if is_long else self._post(packed.whole())
            return self._in_turn(begin, is_long)
        except LinkError as error:
            return failed(error)

    def _in_turn(self, begin: Callable[[], Future[Message]], is_long: bool) -> Future[Message]:
        """Keep later messages from overtaking one that goes out in chunks."""
        with self._lock:
            before = self._last_pushed
            if before is not None and not before.done():
                self._last_pushed = sent = afterwards(before, begin)
                return sent
            if is_long:
                self._last_pushed = sent = begin()
                return sent
            self._last_pushed = None
        return begin()

    def _post(self, frame: bytes) -> Callable[[], Future[Message]]:
        return lambda: map_result(self._exchange(frame), self._arrived)  # type: ignore[arg-type]

    def _push(self, message: Message, packed: Packed) -> Callable[[], Future[Message]]:
        held = self._wrapper.hold(message, packed)
        return lambda: self._aside(lambda up: self._courier(up).deliver(self._wrapper.wrap(message, held)))

    def _arrived(self, frame: bytes) -> Message | Future[Message]:
        answer = self._read(frame)
        return self._aside(lambda up: self._courier(up).fetch(answer)) if isinstance(answer, Parcel) else answer

    def _exchange(self, frame: bytes) -> Future[bytes]:
        """Send a request; it is counted if the link accepts it. Raises ``LinkError``."""
        sent = self._bytes_link.send(frame)
        self._ledger.record(self._kind, self._direction, frame)
        return sent

    def _read(self, frame: bytes) -> Message:
        self._ledger.record(self._kind, opposite(self._direction), frame)
        return self._codec.decode(frame)

    def _aside(self, work: Callable[[GivenUp], A]) -> Future[A]:
        """Run work that may wait."""
        return aside(work)

    def _courier(self, given_up: GivenUp) -> Courier:
        return Courier(self._codec, self._arrivals, self._other, lambda message: self._ask(message, given_up))

    def _ask(self, message: Message, given_up: GivenUp) -> Message:
        """Wait for the reply to a single frame. Raises ``LinkLost`` if it has been given up."""
        sent = self._exchange(self._codec.encode(message))
        while not given_up():
            try:
                return self._read(sent.result(_LOOK_S))
            except TimeoutError:
                if sent.done():  # it came at this moment, or the other end raised a TimeoutError
                    return self._read(sent.result())
        sent.cancel()
        raise LinkLost(self._other, "nobody waits for its answer any longer")


def coded(handler: Handler, codec: Codec) -> Callable[[str, bytes], bytes | Future[bytes]]:
    """Wrap a tier so that it answers frames. Its errors pass through."""
    depots = Depots(codec)
    return lambda asker, frame: depots.depot_for(asker).answer(frame, handler.handle)
