"""Messages of a run: releases, smashed data, gradients, updates and scores.

Shape legend: N rows (positions of several sequences, one after the other), E examples, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import StrictFloat, StrictInt
from torch import Tensor

from gaisnet.config import DevicePrecision
from gaisnet.messages.message import MOST, Message, Role, Scored, Split, Whose, wire


@dataclass(frozen=True)
class Install(Message):
    """Cloud -> edge, before every cycle: hold everything that the run needs; ask the cloud for what is missing."""

    run: str  # a run and its resumptions have one name
    model: str  # digest of the ``ModelRelease``


@dataclass(frozen=True)
class Installed(Message):
    """Edge -> cloud: it has the model, and these versions of adapters; -1 for none."""

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
    """Cloud -> edge -> device, once: the frozen weights of the receiver's parts, and nothing more."""

    config_json: str  # the FM's transformers configuration
    layers: tuple[StrictInt, ...]  # FM numbers of the layers in ``tensors``
    int8_layers: tuple[StrictInt, ...]  # those of them in int8
    tensors: dict[str, Tensor]  # by their names in the FM's decoder; frozen, in their own dtypes
    precision: DevicePrecision = "float32"  # of embeddings, vocabulary head, and layers of head and tail


@dataclass(frozen=True)
class AdapterRelease(Message):
    """Cloud -> edge -> local device: an adapter to install."""

    role: Role
    version: StrictInt
    tensors: dict[str, Tensor] = wire("adapter")  # float, see adapters/state.py for names and shapes


@dataclass(frozen=True)
class AnchorRelease(Message):
    """Cloud -> edge -> local device, once: the FM's hidden states on generated text, at the first adapted layer.

    An adapter that leaves the suffix's output on it unchanged has forgotten little.
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
    """Local device -> edge -> cloud: a trained domain adapter."""

    version: StrictInt  # one more than the cycle in which it was trained
    base: StrictInt  # version of the release that training started from
    num_examples: StrictInt
    num_steps: StrictInt
    loss: StrictFloat  # mean over the label tokens of the last epoch
    faults: tuple[str, ...]  # a sentence for each device that was left out
    tensors: dict[str, Tensor] = wire("adapter")


@dataclass(frozen=True)
class LengthsRequest(Message):
    """Cloud -> edge -> device: report the lengths of examples."""


@dataclass(frozen=True)
class Lengths(Message):
    """Device -> edge: lengths of its examples, all sets together. Only counts."""

    num_examples: StrictInt
    num_truncated: StrictInt  # examples with more tokens than the context
    longest: StrictInt  # tokens of the longest example before truncation; 0 if examples are not text

    def __post_init__(self) -> None:
        if not 0 <= self.num_truncated <= self.num_examples <= MOST or not 0 <= self.longest <= MOST:
            raise ValueError("lengths of examples are no counts")


@dataclass(frozen=True)
class LengthsOfDevices(Message):
    """Edge -> cloud: lengths of every reachable device, numbers in the order of ``Lengths``."""

    owners: tuple[str, ...]
    counts: tuple[tuple[StrictInt, StrictInt, StrictInt], ...]

    @classmethod
    def from_devices(cls, lengths: Mapping[str, Lengths]) -> "LengthsOfDevices":
        """Collect the lengths of devices by name."""
        return cls(tuple(lengths), tuple((n.num_examples, n.num_truncated, n.longest) for n in lengths.values()))

    def by_device(self) -> dict[str, Lengths]:
        """Return the lengths by name."""
        return {owner: Lengths(*counts) for owner, counts in zip(self.owners, self.counts, strict=True)}

    def __post_init__(self) -> None:
        if len(set(self.owners)) != len(self.owners) or len(self.by_device()) != len(self.counts):
            raise ValueError("lengths of examples that are not one entry per device")


@dataclass(frozen=True)
class SmashRequest(Message):
    """Edge -> device: run the head over the examples of this set."""

    split: Split


@dataclass(frozen=True)
class SmashedData(Message):
    """Device -> edge (-> cloud): the head's output for all examples of a set, once.

    Example e has ``lengths_E[e]`` rows; ``num_labels_E[e]`` of them predict a label: a decoder's last ones, an
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
    num_labels_total: StrictInt  # label tokens of the whole step, all devices: the divisor of a summed loss
    examples_E: Tensor  # int32, indices into the device's set
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
    num_correct: StrictInt  # every label token is the most likely: greedy decoding would write the completion, and stop
    num_tokens: StrictInt
    loss_sum: StrictFloat  # over label tokens

    def __add__(self, other: "EvaluationReport") -> "EvaluationReport":
        """Add counts and sums of two sets of examples."""
        return EvaluationReport(
            self.num_examples + other.num_examples,
            self.num_correct + other.num_correct,
            self.num_tokens + other.num_tokens,
            self.loss_sum + other.loss_sum,
        )


@dataclass(frozen=True)
class FineTune(Message):
    """Cloud -> edge, edge -> local device: train on private data, starting from the domain adapter in place."""

    cycle: StrictInt
    edge_round: StrictInt = 0


@dataclass(frozen=True)
class Evaluate(Message):
    """Cloud -> edge: score the test sets of your devices with a body."""

    body: Whose
    adapter: str | None  # on the foundation: the name of the adapter to activate
    split: Scored = "test"


@dataclass(frozen=True)
class EvaluateGuest(Message):
    """Cloud -> edge: score the test sets of your devices with another domain's model, made of these adapters."""

    relay: dict[str, Tensor] = wire("adapter")  # empty if models have none
    domain: dict[str, Tensor] = wire("adapter")


@dataclass(frozen=True)
class TrafficRequest(Message):
    """Cloud -> edge: report your traffic."""


@dataclass(frozen=True)
class TrafficReport(Message):
    """Edge -> cloud: bytes of all requests that the edge made, and of their replies, since the run began."""

    device_edge_up: StrictInt
    device_edge_down: StrictInt
    edge_cloud_up: StrictInt
    edge_cloud_down: StrictInt


@dataclass(frozen=True)
class BodyRequest(Message):
    """Edge -> cloud: the FM body's output for smashed data sent before, with an active adapter."""

    owner: str
    adapter: str | None
    split: Scored = "test"


@dataclass(frozen=True)
class ShareRequest(Message):
    """Cloud -> edge: send the smashed data of training examples, from devices that allow it at the cloud."""


@dataclass(frozen=True)
class Shared(Message):
    """Edge -> cloud: the smashed data of these devices has been sent."""

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
    def from_output(cls, owner: str, output: BodyOutput) -> "LabelRequest":
        """Make a request for one owner's share of a step."""
        return cls(owner, output.step, output.num_labels_total, output.examples_E, output.rows_ND)

    def to_owner(self) -> BodyOutput:
        """Return the request to the device. Raises ``ValueError`` if it is invalid."""
        return BodyOutput("train", self.step, self.num_labels_total, self.examples_E, self.rows_ND)

    def __post_init__(self) -> None:
        self.to_owner()
