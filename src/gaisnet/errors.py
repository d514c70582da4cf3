"""Every error that GaisNet raises on purpose.

Each class owns its message and takes values. A message has three parts: what was asked, what was found, what to do.
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Self


class GaisnetError(Exception):
    """Root of the tree: catch this to catch everything that GaisNet raises on purpose."""

    @classmethod
    def quoted(cls, text: str) -> Self:
        """What another site raised, from what it said."""
        error = cls.__new__(cls)
        Exception.__init__(error, text)
        return error


class ConfigError(GaisnetError):
    """The configuration, or something it names, cannot be used. Raised before any work starts."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"{asked}: {found}; {do}")


class UnknownKey(ConfigError):
    """A configuration key that no model declares; names the nearest key that exists."""

    def __init__(self, key: str, nearest: str | None, known: Iterable[str]) -> None:
        do = f"did you mean '{nearest}'?" if nearest else f"use one of: {', '.join(sorted(known))}"
        super().__init__(f"configuration key '{key}'", "is not known", do)


class DataError(ConfigError):
    """A device's examples or a domain's data set cannot be used."""


class MissingPackage(DataError):
    """A data set or model needs a package that is not installed."""

    def __init__(self, wanted: str, package: str, pip_line: str) -> None:
        super().__init__(wanted, f"the package '{package}' is not installed", f"run: {pip_line}")


class LockTaken(GaisnetError):
    """Another process has a lock, or may have it.

    Attributes:
        holder: The process in words, as far as it is known.
        lost: Whether it ran on another host, and nobody here can tell whether it still does.
    """

    def __init__(self, lock: Path, holder: object | None, lost: bool = False) -> None:
        self.holder = str(holder or "a process that has not said its name yet")
        self.lost = lost
        self.do = f"if that process has ended, remove '{lock}'" if lost else "wait until that process ends, or end it"
        super().__init__(f"lock '{lock}': {self.found}; {self.do}")

    @property
    def found(self) -> str:
        """The holder, in words."""
        if self.lost:
            return f"was taken by {self.holder}; on a network file system nobody here can tell whether it has ended"
        return f"is taken by {self.holder}"


class NoLocks(ConfigError):
    """A file system has no locks that are freed when a process dies."""

    def __init__(self, lock: Path, found: str) -> None:
        do = "use a folder on a local disk, or mount the file system with locks (for NFS, without nolock)"
        super().__init__(f"lock '{lock}'", f"its file system has no locks ({found})", do)


class OutputInUse(ConfigError):
    """The output folder belongs to a run that is under way or to one that has finished."""

    def __init__(self, folder: Path, found: str, do: str = "choose another with --out, or remove it") -> None:
        super().__init__(f"output folder '{folder}'", found, do)


class NothingToResume(ConfigError):
    """A folder holds no run that could go on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"output folder '{folder}'", "no part of a run was finished in it", "start one with --out")


class OutputNotWritable(GaisnetError):
    """A file or folder of a run cannot be written: a full disk, missing rights, a folder that went away."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"writing '{path}': {found}; free some space or choose a writable folder with --out")


class CacheNotWritable(GaisnetError):
    """A model that this machine has made cannot be kept: a full disk, missing rights, no such folder."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"keeping a model in '{path}': {found}; free some space, or let GAISNET_CACHE name a folder of a disk that "
            "can be written"
        )


class NoCache(GaisnetError):
    """There is no folder for models that this machine makes."""

    def __init__(self, found: str) -> None:
        super().__init__(f"keeping a model in '~/.cache/gaisnet': {found}; let GAISNET_CACHE name a folder")


class ActivationsNotKept(GaisnetError):
    """Activations beyond the limit in memory cannot be written to a file. What was kept before is as it was."""

    def __init__(self, size_bytes: int, folder: str, found: str) -> None:
        super().__init__(
            f"keeping {size_bytes / 2**20:.0f} MiB of activations in a file of '{folder}': {found}; free some space, "
            "let TMPDIR name a folder with more, or raise service.max_activations_mib, and resume"
        )


class CheckpointError(GaisnetError):
    """A checkpoint is there but cannot be read."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(f"checkpoint '{path}' cannot be read: {found}; remove it to start again without it")


class ModelError(GaisnetError):
    """A foundation model cannot be found, read, or is of a family that GaisNet cannot cut."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"foundation model '{asked}': {found}; {do}")


class CutError(GaisnetError):
    """A cut, a recipe's layer or the first adapter layer is out of range."""

    def __init__(self, setting: str, value: object, found: str, do: str) -> None:
        super().__init__(f"{setting} is {value} but {found}; {do}")


class NotFinite(GaisnetError):
    """A loss became NaN or infinite: the step is named and the run stops."""

    def __init__(self, what: str, step: str, value: float) -> None:
        super().__init__(
            f"{what} at {step} is {value}; what was finished before it is on disk; "
            "lower the learning rate, or look for broken examples"
        )


class AdapterError(GaisnetError):
    """An adapter cannot be used."""


class AdapterMismatch(AdapterError):
    """An adapter does not fit the body it should be put into."""

    def __init__(self, adapter: str, expected: str, found: str) -> None:
        super().__init__(
            f"adapter '{adapter}': expected {expected}, found {found}; train and use it on the same layers"
        )


class StaleAdapter(AdapterError):
    """An adapter grew out of a release that is not the one in place."""

    def __init__(self, adapter: str, expected: int, found: int) -> None:
        super().__init__(
            f"adapter '{adapter}': expected one grown out of version {expected}, found version {found}; "
            "release the present one and learn again"
        )


class UnknownAdapter(AdapterError):
    """A session asks for an adapter that its body does not serve."""

    def __init__(self, adapter: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted(known)) or "none"
        super().__init__(f"adapter '{adapter}': it is not served here; served are: {names}")


class ServingError(GaisnetError):
    """A body cannot serve what a session asks for; the others are not disturbed."""


class ServiceFull(ServingError):
    """A session, or more of one, does not fit into the memory that the service may use. Nothing was changed."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; try again when other sessions have ended, or raise the service's limits")


class QuotaReached(ServiceFull):
    """A peer holds as much of a service as one peer may. Nothing was changed, and the others are served."""

    def __init__(self, peer: str, asked: str, found: str) -> None:
        super().__init__(f"{asked} of '{peer}'", f"{found} (service.max_share_per_peer)")


class ContextFull(ServingError):
    """More positions than the model was made for."""

    def __init__(self, wanted: int, limit: int) -> None:
        super().__init__(f"a session of {wanted} tokens: the model takes {limit}; shorten the prompt or the answer")


class SessionClosed(ServingError):
    """A session is not open here: it never was, or it has ended."""

    def __init__(self, session: str) -> None:
        super().__init__(f"session '{session}': it is not open here; open a new one")


class SessionRefused(ServingError):
    """What a session asks for cannot be meant."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(f"{asked}: {found}; {do}")


class BodyUnreachable(ServingError):
    """The body that a session needs is at a site that is away. What the session had goes on."""

    def __init__(self, body: str, found: str) -> None:
        super().__init__(f"a session of {body}: {found}; go on with another body, or try again when it is back")


class UnknownModel(ServingError):
    """A caller names a model, or a domain, that is not served."""

    def __init__(self, model: str, known: Iterable[str]) -> None:
        super().__init__(f"model '{model}': it is not served here; served are: {', '.join(sorted(known))}")


class ServerRefused(GaisnetError):
    """A server of answers cannot be reached, or does not give what it is asked for."""

    def __init__(self, url: str, found: str) -> None:
        super().__init__(f"asking {url}: {found}; see 'gaisnet serve --help'")


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


class DeploymentError(GaisnetError):
    """The sites of a network cannot be prepared, started or ended."""


class ProvisionFailed(DeploymentError):
    """NVFlare made no startup kits."""

    def __init__(self, network: str, found: str) -> None:
        super().__init__(
            f"startup kits for network '{network}': {found}; check the names and addresses of the sites, and that the "
            "output folder is writable"
        )


class KitUnreadable(DeploymentError):
    """A folder is not a site's kit, or a file of it is missing or damaged."""

    def __init__(self, folder: Path, found: str) -> None:
        super().__init__(f"site kit '{folder}': {found}; copy the kit again, or make new ones with 'deploy prepare'")


class CertificateInvalid(DeploymentError):
    """A site's certificate, or its authority's, is not valid at this moment: no other site would let it in."""

    def __init__(self, file: Path, found: str, now: datetime, expired: bool) -> None:
        renew = "make new kits with 'deploy prepare' into a new folder, and give every site its own"
        do = renew if expired else "set this host's clock"
        super().__init__(f"certificate '{file}': {found}, and it is {now:%Y-%m-%d %H:%M} UTC on this host; {do}")


class KitInUse(DeploymentError):
    """Another process runs the site of a kit."""

    def __init__(self, folder: Path, found: str, do: str) -> None:
        super().__init__(f"site kit '{folder}': {found}; {do}")


class ProcessFailed(DeploymentError):
    """A process of the launch ends again and again, or cannot be started."""

    def __init__(self, name: str, found: str, log: Path, last_lines: str) -> None:
        super().__init__(f"process '{name}' {found}; its log is '{log}', which ends with:\n{last_lines}")


class ProcessesLeft(DeploymentError):
    """Processes of the launch are alive after SIGKILL."""

    def __init__(self, left: Iterable[int]) -> None:
        numbers = ", ".join(map(str, left))
        super().__init__(f"stopping the launch: processes {numbers} are still alive after SIGKILL; end them by hand")


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


class MeasureError(GaisnetError):
    """A benchmark could not measure what it was asked to."""

    def __init__(self, asked: str, found: str) -> None:
        super().__init__(f"{asked}: {found}; see what was written above, and run it again")
