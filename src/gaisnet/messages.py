"""Everything that crosses a link: one frozen dataclass per message.

Shape legend: B bytes, N rows (positions of several sequences, one after the other), E examples, T positions of one
session, W those that are wanted back, D hidden size. All tensors are on the CPU. ``wire(...)`` names the setting under
``wire`` that says how a floating tensor is written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt
from torch import Tensor

from gaisnet.config import DevicePrecision

Split = Literal["train", "validate", "test"]
"""Of a device's examples: to learn from; held back, for the gate; held out, for scores."""
Scored = Literal["validate", "test"]
"""Those of which anybody may ask how many are right."""

MOST = 2**31 - 1
"""A count beyond it is a lie."""
_SHA256 = re.compile("[0-9a-f]{64}")

Role = Literal["relay", "domain"]
Whose = Literal["domain", "foundation"]


def wire(setting: str, short_whole: bool = False) -> Any:
    """A tensor field that is written as ``config.wire.<setting>`` says.

    With ``short_whole``, rows that are shorter than a group of int4 are written in float32 where it says int4: they are
    the logits of a few classes, whose scales would take as many bytes as are saved, and whose errors all count.
    """
    return field(metadata={"wire": setting, "short_whole": short_whole})


@dataclass(frozen=True)
class Message:
    """Root of all messages."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True, strict=False, extra="forbid")


LASTING = frozenset({"ModelRelease"})
"""Names of messages whose tensors never change within a run: they may be read while they are sent, and be kept in
part."""


@dataclass(frozen=True)
class Parcel(Message):
    """Either end, in place of a message that is longer than a frame: it comes in chunks, see ``transport.parcels``."""

    message: str  # class of what is in it
    digest: str  # SHA-256 over the digests of the chunks, in hex
    size_bytes: StrictInt
    chunk_bytes: StrictInt  # of each but the last

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.digest) or self.size_bytes < 1 or self.chunk_bytes < 1:
            raise ValueError("a parcel needs a SHA-256 digest, and bytes in chunks")

    @property
    def num_chunks(self) -> int:
        """How many there are."""
        return -(-self.size_bytes // self.chunk_bytes)


@dataclass(frozen=True)
class Wanted(Message):
    """Answer to an offered ``Parcel``: begin with this chunk; those before it are here."""

    chunk: StrictInt

    def __post_init__(self) -> None:
        if self.chunk < 0:
            raise ValueError("chunks are counted from 0")


@dataclass(frozen=True)
class ChunkRequest(Message):
    """Request for a chunk of a ``Parcel`` that was offered as an answer."""

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
    def of(cls, digest: str, index: int, sha256: str, data: bytearray) -> "Chunk":
        """With these bytes."""
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
    """Sent after the last chunk of a request: act on the message in the parcel, and answer that."""

    digest: str


@dataclass(frozen=True)
class ParcelTaken(Message):
    """Sent after the last chunk of an answer: the parcel is here, and need not be kept."""

    digest: str


@dataclass(frozen=True)
class Done(Message):
    """Carried out; nothing to say."""


@dataclass(frozen=True)
class Install(Message):
    """Cloud -> edge, before every cycle: have what the run needs; ask the cloud for what you lack."""

    run: str  # a run, and all that resume it, have one name
    model: str  # digest of the ``ModelRelease``


@dataclass(frozen=True)
class Installed(Message):
    """Edge -> cloud: it has the model, and these versions of the adapters; -1 for none."""

    relay: StrictInt
    domain: StrictInt


@dataclass(frozen=True)
class ModelRequest(Message):
    """Edge -> cloud: send the ``ModelRelease``."""


@dataclass(frozen=True)
class AnchorRequest(Message):
    """Edge -> cloud: send the ``AnchorRelease``."""


@dataclass(frozen=True)
class ModelRelease(Message):
    """Cloud -> edge -> device, once: the frozen weights that the receiver's parts need, and nothing more."""

    config_json: str  # the FM's transformers configuration
    layers: tuple[StrictInt, ...]  # FM numbers of the layers in ``tensors``
    int8_layers: tuple[StrictInt, ...]  # those of them in int8
    tensors: dict[str, Tensor]  # by their names in the FM's decoder; frozen, in their own dtypes
    precision: DevicePrecision = "float32"  # of embeddings, vocabulary head, and layers of head and tail


@dataclass(frozen=True)
class AdapterRelease(Message):
    """Cloud -> edge -> local device: an adapter to put in."""

    role: Role
    version: StrictInt
    tensors: dict[str, Tensor] = wire("adapter")  # float, see adapters/state.py for names and shapes


@dataclass(frozen=True)
class AnchorRelease(Message):
    """Cloud -> edge -> local device, once: what the FM makes of text that it wrote, where the domain adapters start.

    An adapter that leaves the suffix's output on it as it was has forgotten little.
    """

    lengths_E: Tensor  # int32
    hidden_ND: Tensor = wire("anchor")  # float, all sequences one after the other

    def __post_init__(self) -> None:
        if self.lengths_E.dtype != torch.int32 or self.lengths_E.ndim != 1 or self.hidden_ND.ndim != 2:
            raise ValueError("an anchor needs int32 lengths and rows [N, D]")
        if bool((self.lengths_E < 1).any()) or int(self.lengths_E.sum()) != len(self.hidden_ND):
            raise ValueError("the lengths of an anchor do not fit its rows")


@dataclass(frozen=True)
class AdapterUpdate(Message):
    """Local device -> edge -> cloud: a domain adapter after learning."""

    version: StrictInt  # one more than the cycle that it was learned in
    base: StrictInt  # version of the release that it grew out of
    num_examples: StrictInt
    num_steps: StrictInt
    loss: StrictFloat  # mean over the label tokens of the last epoch
    faults: tuple[str, ...]  # what went wrong with which device, a sentence each
    tensors: dict[str, Tensor] = wire("adapter")


@dataclass(frozen=True)
class LengthsRequest(Message):
    """Cloud -> edge -> device: how long are examples?"""


@dataclass(frozen=True)
class Lengths(Message):
    """Device -> edge: how long its examples are, those of all splits together. Only counts."""

    num_examples: StrictInt
    num_truncated: StrictInt  # those that have more tokens than the context holds
    longest: StrictInt  # tokens of the longest one, before it is truncated; 0 where examples are no text

    def __post_init__(self) -> None:
        if not 0 <= self.num_truncated <= self.num_examples <= MOST or not 0 <= self.longest <= MOST:
            raise ValueError("lengths of examples are no counts")


@dataclass(frozen=True)
class LengthsOfDevices(Message):
    """Edge -> cloud: the same of every device that could be had, numbers in the order of ``Lengths``."""

    owners: tuple[str, ...]
    counts: tuple[tuple[StrictInt, StrictInt, StrictInt], ...]

    @classmethod
    def of(cls, lengths: Mapping[str, Lengths]) -> "LengthsOfDevices":
        """From the lengths of devices by name."""
        return cls(tuple(lengths), tuple((n.num_examples, n.num_truncated, n.longest) for n in lengths.values()))

    def by_device(self) -> dict[str, Lengths]:
        """The same by name."""
        return {owner: Lengths(*counts) for owner, counts in zip(self.owners, self.counts, strict=True)}

    def __post_init__(self) -> None:
        if len(set(self.owners)) != len(self.owners) or len(self.by_device()) != len(self.counts):
            raise ValueError("lengths of examples that are not one entry per device")


@dataclass(frozen=True)
class SmashRequest(Message):
    """Edge -> device: run the head over your examples of this split."""

    split: Split


@dataclass(frozen=True)
class SmashedData(Message):
    """Device -> edge (-> cloud): the head's output for all examples of a split, once.

    Example e holds ``lengths_E[e]`` rows; ``num_labels_E[e]`` of them predict a label: a decoder's last ones, an
    encoder's first.
    """

    owner: str  # the device
    split: Split
    next_layer: StrictInt  # first FM layer that has not run
    lengths_E: Tensor  # int32
    num_labels_E: Tensor  # int32
    hidden_ND: Tensor = wire("smashed")  # float

    def __post_init__(self) -> None:
        lengths, labels = self.lengths_E, self.num_labels_E
        if self.hidden_ND.ndim != 2 or lengths.ndim != 1 or lengths.shape != labels.shape:
            raise ValueError("smashed data needs rows [N, D] and one length and label count per example")
        if lengths.dtype != torch.int32 or labels.dtype != torch.int32:
            raise ValueError("lengths and label counts must be int32")
        if bool((labels < 1).any()) or bool((labels > lengths).any()) or int(lengths.sum()) != len(self.hidden_ND):
            raise ValueError("lengths and label counts of smashed data do not fit its rows")


@dataclass(frozen=True)
class BodyOutput(Message):
    """Edge or cloud -> device: the body's output at the rows that the tail needs, in the order of ``examples_E``."""

    split: Split
    step: StrictInt
    num_labels_total: StrictInt  # label tokens of the whole step, all devices: what a summed loss is divided by
    examples_E: Tensor  # int32, indices into the device's split
    # float; label positions, or every position where the tail has layers; of an encoder logits, one row per example
    rows_ND: Tensor = wire("body_output", short_whole=True)

    def __post_init__(self) -> None:
        if self.examples_E.ndim != 1 or self.examples_E.dtype != torch.int32 or self.rows_ND.ndim != 2:
            raise ValueError("body output needs int32 example numbers [E] and rows [N, D]")
        if self.num_labels_total < 1:
            raise ValueError("a step without label tokens has no loss")


@dataclass(frozen=True)
class BodyOutputGrad(Message):
    """Device -> edge (-> cloud): gradient of the step's mean loss at the rows of a ``BodyOutput``."""

    step: StrictInt
    loss_sum: StrictFloat  # over this device's label tokens
    grad_ND: Tensor = wire("gradient", short_whole=True)  # float


@dataclass(frozen=True)
class EvaluationReport(Message):
    """Device -> edge -> cloud: only counts and sums."""

    num_examples: StrictInt
    num_correct: StrictInt  # every label token is the likeliest: greedy decoding would write the completion, and stop
    num_tokens: StrictInt
    loss_sum: StrictFloat  # over label tokens

    def __add__(self, other: "EvaluationReport") -> "EvaluationReport":
        """Counts and sums of two sets of examples together."""
        return EvaluationReport(
            self.num_examples + other.num_examples,
            self.num_correct + other.num_correct,
            self.num_tokens + other.num_tokens,
            self.loss_sum + other.loss_sum,
        )


@dataclass(frozen=True)
class FineTune(Message):
    """Cloud -> edge, edge -> local device: learn from private data, starting from the domain adapter in place."""

    cycle: StrictInt
    edge_round: StrictInt = 0


@dataclass(frozen=True)
class Evaluate(Message):
    """Cloud -> edge: score the held-out examples of your devices with a body."""

    body: Whose
    adapter: str | None  # on the foundation: the name of the adapter to plug in
    split: Scored = "test"


@dataclass(frozen=True)
class EvaluateGuest(Message):
    """Cloud -> edge: score the held-out examples of your devices with another domain's model, which these make."""

    relay: dict[str, Tensor] = wire("adapter")  # empty where models have none
    domain: dict[str, Tensor] = wire("adapter")


@dataclass(frozen=True)
class TrafficRequest(Message):
    """Cloud -> edge: how much have you sent and got?"""


@dataclass(frozen=True)
class TrafficReport(Message):
    """Edge -> cloud: bytes of all requests that the edge made, and of their answers, since the run began."""

    device_edge_up: StrictInt
    device_edge_down: StrictInt
    edge_cloud_up: StrictInt
    edge_cloud_down: StrictInt


@dataclass(frozen=True)
class BodyRequest(Message):
    """Edge -> cloud: the FM body's output for smashed data sent before, with an adapter plugged in."""

    owner: str
    adapter: str | None
    split: Scored = "test"


@dataclass(frozen=True)
class ShareRequest(Message):
    """Cloud -> edge: send up the smashed data of training examples, of devices that let it travel to the cloud."""


@dataclass(frozen=True)
class Shared(Message):
    """Edge -> cloud: the smashed data of these devices is there."""

    owners: tuple[str, ...]


@dataclass(frozen=True)
class LabelRequest(Message):
    """Cloud -> edge: ask a device for the gradient at these rows, as a ``BodyOutput`` of its training examples does."""

    owner: str
    step: StrictInt
    num_labels_total: StrictInt
    examples_E: Tensor
    rows_ND: Tensor = wire("body_output", short_whole=True)

    @classmethod
    def of(cls, owner: str, output: BodyOutput) -> "LabelRequest":
        """For one owner's share of a step."""
        return cls(owner, output.step, output.num_labels_total, output.examples_E, output.rows_ND)

    def to_owner(self) -> BodyOutput:
        """What the device is asked. Raises ``ValueError`` where it is none."""
        return BodyOutput("train", self.step, self.num_labels_total, self.examples_E, self.rows_ND)

    def __post_init__(self) -> None:
        self.to_owner()


@dataclass(frozen=True)
class OpenSession(Message):
    """Device -> edge -> cloud: begin to write an answer on layers [first, stop) of a body."""

    first: StrictInt
    stop: StrictInt
    adapters: tuple[str, ...]  # what acts, in the versions that are in place now
    num_positions: StrictInt  # memory to hold from the beginning: the prompt's and the answer's tokens
    body: Whose = "domain"  # the edge's own, or the FM's, which it passes the session on to
    may_escalate: StrictBool = False  # the edge keeps the rows, so that the FM's body can take over

    def __post_init__(self) -> None:
        if self.num_positions < 0:
            raise ValueError("a session cannot hold memory for fewer than no positions")


@dataclass(frozen=True)
class SessionOpened(Message):
    """Edge or cloud -> device: it is open, under this name."""

    session: str
    adapters: tuple[str, ...] = ()  # what acts to the end of it, each as name@version


@dataclass(frozen=True)
class ExtendSession(Message):
    """Device -> edge -> cloud: run these positions; answered by ``SessionRows``."""

    session: str
    position: StrictInt  # of the first row; where the session does not stand there, nothing runs
    want: StrictInt  # how many of the last output rows the tail needs
    rows_TD: Tensor = wire("session")  # float

    def __post_init__(self) -> None:
        if self.rows_TD.ndim != 2 or not 0 <= self.want <= len(self.rows_TD) or self.position < 0:
            raise ValueError("a session takes rows [T, D] at a position, and gives back at most as many")


@dataclass(frozen=True)
class SessionRows(Message):
    """Edge or cloud -> device: the body's output at the positions that were wanted."""

    rows_WD: Tensor = wire("session")  # float

    def __post_init__(self) -> None:
        if self.rows_WD.ndim != 2:
            raise ValueError("output rows must be [W, D]")


@dataclass(frozen=True)
class EscalateSession(Message):
    """Device -> edge: let the FM's body go on with this session; answered by its ``SessionRows``.

    The edge sends the cloud the rows that it has kept. What the device asks of the session afterwards goes there, too.
    """

    session: str
    adapters: tuple[str, ...]  # what acts over there
    want: StrictInt  # how many of the last output rows the tail needs

    def __post_init__(self) -> None:
        if self.want < 0:
            raise ValueError("a session gives back no fewer than no rows")


@dataclass(frozen=True)
class CropSession(Message):
    """Device -> edge -> cloud: forget the session's positions from ``length`` on."""

    session: str
    length: StrictInt


@dataclass(frozen=True)
class CloseSession(Message):
    """Device -> edge -> cloud: the answer has ended, or nobody wants more of it."""

    session: str
