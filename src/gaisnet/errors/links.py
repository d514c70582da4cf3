"""Errors of links, and of the parties at their other ends."""

from gaisnet.errors.runs import GaisnetError


class TooFewDevices(GaisnetError):
    """Fewer devices took part in an edge round than the configuration asks for."""

    def __init__(self, edge: str, wanted: int, found: int, reasons: str) -> None:
        super().__init__(
            f"edge '{edge}' needs {wanted} devices for a round (faults.min_devices) but {found} took part: {reasons}; "
            "bring devices back, or lower the number, and resume"
        )


class TooFewEdges(GaisnetError):
    """Fewer edges are left in a cycle than the configuration asks for."""

    def __init__(self, wanted: int, found: int, reasons: str) -> None:
        super().__init__(
            f"a cycle needs {wanted} edges (faults.min_edges) but {found} are left: {reasons}; "
            "bring edges back, or lower the number, and resume"
        )


class LinkError(GaisnetError):
    """A message could not cross a link."""


class LinkTimeout(LinkError):
    """The other end did not answer in time."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; look at the log of the other site, or raise the deadline under 'faults'")


class WireFormatError(LinkError):
    """Bytes from a link that are not a message: nothing of them is used."""

    def __init__(self, found: str) -> None:
        super().__init__(f"a frame from the link cannot be read: {found}; the frame is dropped")


class WireVersion(WireFormatError):
    """A message in another version of the wire protocol: nothing of it is used."""

    def __init__(self, found: str, supported: str) -> None:
        LinkError.__init__(
            self,
            f"a message is in version {found} of the wire protocol, and this site speaks version {supported}; install "
            "the same release of GaisNet at all sites, the cloud first (docs/compatibility.md)",
        )


class OutOfBounds(WireFormatError):
    """A value that a party cannot mean: nothing of its message is used, and the party is left out."""

    def __init__(self, party: str, what: str, found: str, expected: str) -> None:
        GaisnetError.__init__(
            self,
            f"{what} of {party}: {found}, where {expected} belongs; it is left out; look at what runs at that site",
        )


class UnexpectedMessage(LinkError):
    """A well-formed message that the receiver does not take at this point."""

    def __init__(self, receiver: str, message: str) -> None:
        super().__init__(f"{receiver} does not take a {message} here; check that both ends run the same version")


class LinkLost(LinkError):
    """A request that will never be answered: the other end restarted and forgot it, or the link was closed."""

    def __init__(self, other: str, found: str) -> None:
        super().__init__(f"a request to '{other}' is lost: {found}; ask again when it is back")


class PeerError(LinkError):
    """The other end received a request and could not answer it.

    Attributes:
        peer_name: The other end.
        kind: The class of what it raised.
        text: What that said.
    """

    def __init__(self, peer_name: str, kind: str, text: str) -> None:
        super().__init__(f"a request to '{peer_name}' failed there with {kind}: {text}")
        self.peer_name = peer_name
        self.kind = kind
        self.text = text


class SiteRefused(LinkError):
    """A site may not speak on a link under the name it gave."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; use a kit of this network that was made for this site")


class AskedTooOften(LinkError):
    """A site asks more, or more often, than one site may."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; ask again in a while")


class MessageTooLarge(LinkError):
    """A payload that the link's limit does not let through."""

    def __init__(self, other: str, size_bytes: int, limit_bytes: int, setting: str = "") -> None:
        setting = setting or "wire.max_message_bytes, or for a device's answers service.max_request_mib"
        super().__init__(f"a message to '{other}': {size_bytes} bytes, the limit is {limit_bytes}; raise {setting}")


class ParcelRefused(LinkError):
    """The other end announces a long message that is not taken. There is no memory for it yet."""

    def __init__(self, other: str, message: str, found: str) -> None:
        super().__init__(
            f"a {message} from '{other}': it is announced with {found}; "
            "set wire.max_transfer_bytes and wire.max_message_bytes alike at both ends, and large enough"
        )


class ParcelUnknown(LinkError):
    """A chunk, or a request for one, belongs to no parcel that is here: this end restarted, or made room for others."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"parcel {digest[:12]}: it is not here (any more); begin again")


class ChunkDamaged(LinkError):
    """The bytes of a chunk are not those that were sent. Nothing of it is used."""

    def __init__(self, other: str, message: str, index: int, num_chunks: int) -> None:
        super().__init__(
            f"a {message} from '{other}': chunk {index} of {num_chunks} has another digest than its bytes; "
            "it is asked for again, and where that does not help look for broken memory, or a proxy between both ends"
        )
