"""Exchange of parcels between the asking and the answering end; see ``transport.parcels``."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from gaisnet.errors import ChunkDamaged, LinkError, LinkLost, ParcelUnknown, PeerError, UnexpectedMessage
from gaisnet.futures import map_result
from gaisnet.messages import Chunk, ChunkRequest, Done, Message, Parcel, ParcelSent, ParcelTaken, Wanted
from gaisnet.transport.arrivals import Arrivals, Arriving
from gaisnet.transport.codec import Codec
from gaisnet.transport.parcels import Outgoing, Wrapper

_TRIES = 3  # for a chunk that arrives damaged
_MOST_PARCELS = 4  # of one asker at once, each way
_log = logging.getLogger(__name__)

Handle = Callable[[Message], Message | Future[Message]]
P = TypeVar("P", Arriving, Outgoing)


class Courier:
    """Sends and receives parcels for the asking end.

    Args:
        codec: Decodes arriving parcels.
        arrivals: Incoming replies.
        other: The other end, for errors.
        ask: Sends a message of a single frame, and waits for its reply of a single frame.
    """

    def __init__(self, codec: Codec, arrivals: Arrivals, other: str, ask: Callable[[Message], Message]) -> None:
        self._codec = codec
        self._arrivals = arrivals
        self._other = other
        self._ask_once = ask

    def deliver(self, parcel: Outgoing) -> Message:
        """Push a parcel; return the reply to its message. Raises ``LinkError``, or the other end's error."""
        wanted = self._ask(parcel.offer)
        if not isinstance(wanted, Wanted):
            raise UnexpectedMessage(f"an end that offers a {parcel.offer.message}", type(wanted).__name__)
        for index in range(wanted.chunk, parcel.offer.num_chunks):
            self._until_whole(lambda index=index: self._ask(parcel.chunk(index)))  # type: ignore[misc]
        answer = self._ask(ParcelSent(parcel.offer.digest))
        return self.fetch(answer) if isinstance(answer, Parcel) else answer

    def fetch(self, offer: Parcel) -> Message:
        """Pull a parcel; return its message. Raises ``LinkError``."""
        arriving = self._arrivals.begin(offer)
        while arriving.next < offer.num_chunks:
            self._until_whole(lambda: arriving.add_chunk(self._chunk(offer, arriving.next)))
        message = arriving.unwrap(self._codec)
        try:
            self._ask(ParcelTaken(offer.digest))
        except LinkError as error:  # the message is here; the other end makes room for others in any case
            _log.debug("'%s' was not told that a %s has arrived: %s", self._other, offer.message, error)
        return message

    def _chunk(self, offer: Parcel, index: int) -> Chunk:
        answer = self._ask(ChunkRequest(offer.digest, index))
        if not isinstance(answer, Chunk):
            raise UnexpectedMessage(f"an end that asks for a chunk of a {offer.message}", type(answer).__name__)
        return answer

    def _until_whole(self, move: Callable[[], object]) -> None:
        """Repeat after a damaged chunk, a few times."""
        for left in reversed(range(_TRIES)):
            try:
                move()
                return
            except LinkError as error:
                if not _is(error, ChunkDamaged) or not left:
                    raise
                _log.warning("%s", error)

    def _ask(self, message: Message) -> Message:
        try:
            return self._ask_once(message)
        except LinkError as error:
            if not _is(error, ParcelUnknown):
                raise
            raise LinkLost(self._other, "it does not know the parcel any more") from error


def _is(error: LinkError, kind: type[LinkError]) -> bool:
    """Return whether an error, or the other end's error, is of a kind."""
    return isinstance(error, kind) or isinstance(error, PeerError) and error.kind == kind.__name__


class Depot:
    """The parcels of one asker at the answering end: incoming ones, and those waiting to be pulled."""

    def __init__(self, codec: Codec, asker: str, wrapper: Wrapper, most_bytes: int | None = None) -> None:
        self._codec = codec
        self._arrivals = Arrivals(codec, asker, most_bytes=most_bytes)
        self._wrapper = wrapper
        self._in: OrderedDict[str, Arriving] = OrderedDict()
        self._out: OrderedDict[str, Outgoing] = OrderedDict()
        self._lock = threading.Lock()

    def answer(self, frame: bytes, handle: Handle) -> bytes | Future[bytes]:
        """Answer a frame, now or later; ``handle`` answers messages that are not chunks. Raises its errors."""
        message = self._codec.decode(frame)
        match message:
            case Parcel():
                return self._codec.encode(Wanted(self._take_in(message)))
            case Chunk():
                self._find(self._in, message.digest).add_chunk(message)
                return self._codec.encode(Done())
            case ParcelSent():
                return self._reply(handle(self._unwrap(message.digest)))
            case ChunkRequest():
                return self._codec.encode(self._find(self._out, message.digest).chunk(message.index))
            case ParcelTaken():
                with self._lock:
                    self._out.pop(message.digest, None)
                return self._codec.encode(Done())
            case _:
                return self._reply(handle(message))

    def _reply(self, reply: Message | Future[Message]) -> bytes | Future[bytes]:
        return map_result(reply, self._frame) if isinstance(reply, Future) else self._frame(reply)

    def _frame(self, reply: Message) -> bytes:
        """Return the frame of a reply, or of its offer."""
        packed = self._codec.pack(reply)
        if packed.size_bytes <= self._codec.frame_bytes:
            return packed.whole()
        parcel = self._wrapper.wrap(reply, self._wrapper.hold(reply, packed))
        with self._lock:
            self._put(self._out, parcel, self._codec.max_transfer_bytes)
        return self._codec.encode(parcel.offer)

    def _take_in(self, offer: Parcel) -> int:
        with self._lock:
            arriving = self._in.get(offer.digest)
            if arriving is None:
                arriving = self._arrivals.begin(offer)
                self._put(self._in, arriving, self._arrivals.most_bytes)
            return arriving.next

    def _unwrap(self, digest: str) -> Message:
        arriving = self._find(self._in, digest)
        message = arriving.unwrap(self._codec)
        with self._lock:
            self._in.pop(digest, None)
        return message

    def _put(self, parcels: OrderedDict[str, P], parcel: P, most_bytes: int) -> None:
        """Store a parcel; the oldest ones make room for it."""
        parcels[parcel.offer.digest] = parcel
        parcels.move_to_end(parcel.offer.digest)
        while len(parcels) > _MOST_PARCELS or (
            len(parcels) > 1 and sum(each.offer.size_bytes for each in parcels.values()) > most_bytes
        ):
            parcels.popitem(last=False)

    def _find(self, parcels: OrderedDict[str, P], digest: str) -> P:
        with self._lock:
            if digest not in parcels:
                raise ParcelUnknown(digest)
            return parcels[digest]


class Depots:
    """A depot for every asker of a site.

    Args:
        codec: Decodes arriving parcels.
        most_bytes: Returns the longest request of an asker by name; None for ``wire.max_transfer_bytes``.
    """

    def __init__(self, codec: Codec, most_bytes: Callable[[str], int | None] = lambda _: None) -> None:
        self._codec = codec
        self._most_bytes = most_bytes
        self._wrapper = Wrapper(codec, "an asker")
        self._depots: dict[str, Depot] = {}
        self._lock = threading.Lock()

    def depot_for(self, asker: str) -> Depot:
        """Return the depot of ``asker``."""
        with self._lock:
            if asker not in self._depots:
                self._depots[asker] = Depot(self._codec, asker, self._wrapper, self._most_bytes(asker))
            return self._depots[asker]
