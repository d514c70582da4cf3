"""A device: the only place that sees private text and labels. It holds head and tail, or (local) the whole DM."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, get_args

import torch
from transformers import PreTrainedTokenizerBase

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import Config, DeviceSettings
from gaisnet.data.examples import DeviceData, Labelled, Tokens
from gaisnet.errors import DataError, SessionRefused, UnexpectedMessage
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    BodyOutput,
    BodyOutputGrad,
    Done,
    EvaluationReport,
    FineTune,
    Lengths,
    LengthsRequest,
    Message,
    ModelRelease,
    SmashedData,
    SmashRequest,
    Split,
)
from gaisnet.models.parts import Head, Tail
from gaisnet.models.ragged import Ragged
from gaisnet.models.release import released
from gaisnet.progress import Progress, silent
from gaisnet.row_quant import row_bytes
from gaisnet.tiers.device.classification import ClassificationExamples
from gaisnet.tiers.device.completion import CompletionExamples
from gaisnet.tiers.device.shared_weights import DeviceWeights, SharedWeights
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, Outcome


class PrivateExamples(Protocol):
    """A device's private examples, and what it computes of them with its parts of the model."""

    def check_model(self, parts: DeviceWeights) -> None:
        """Raise ``DataError`` where they are for another kind of model."""

    def count_rows(self, split: Split) -> int:
        """How many rows that will be; 0 where only the head can tell."""

    def compute_activations(self, split: Split, parts: DeviceWeights) -> Ragged:
        """What the head makes of a split, without gradients."""

    def count_labels(self, split: Split) -> list[int]:
        """How many rows of each example carry a label."""

    def measure_lengths(self) -> Lengths:
        """How long they are."""

    def compute_gradient(self, output: BodyOutput, parts: DeviceWeights) -> BodyOutputGrad:
        """Sum of the losses, and the gradient of (sum / labels of the whole step). Raises ``WireFormatError``."""

    def evaluate_output(self, output: BodyOutput, parts: DeviceWeights) -> EvaluationReport:
        """Counts and sums. Raises ``WireFormatError``."""


class Device:
    """Answers its edge.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        tokenizer: The FM's; None where it takes images.
        data: Its private examples.
        progress: Told while a local device learns.
        compute_lock: Of the machine that it is on, held while it computes; None for one of its own.
        stock: Of the same machine: frozen parts, shared by its devices; None for one of its own.
        learns: Whether it must have examples to learn from.
        present: Whether its examples are there at all; without them it holds head and tail to answer with.
        labels: Names of its domain's classes, where there are such.

    Raises:
        DataError: No example to hold out, or to learn from if it learns; a completion longer than the context, or a
            label that is not among its edge's.
    """

    def __init__(
        self,
        settings: DeviceSettings,
        config: Config,
        tokenizer: PreTrainedTokenizerBase | None,
        data: DeviceData[Any],
        progress: Progress = silent,
        compute_lock: ComputeLock | None = None,
        shared_weights: SharedWeights | None = None,
        learns: bool = True,
        present: bool = True,
        labels: Sequence[str] = (),
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._progress = progress
        self._compute_lock = compute_lock or ComputeLock()
        self._shared_weights = shared_weights or SharedWeights(config, self._compute_lock)
        self._reader = tokenizer
        self._labels = labels
        holds_back = learns and config.absorb.validation_share > 0.0
        for split, needed in (("train", learns), ("test", present), ("validate", holds_back)):
            if needed and not getattr(data, split):
                do = (
                    "call DeviceData.with_validation_split"
                    if split == "validate"
                    else "give it some, or remove the device"
                )
                raise DataError(f"device '{self.name}'", f"has no {split} examples", do)
        self._own = self._read(data)
        self._parts: DeviceWeights | None = None
        self._domain: DomainModel | None = None
        self._learning_inputs: Activations | None = None

    def _read(self, data: DeviceData[Any]) -> PrivateExamples:
        """By what there is: prompts and completions, or labels."""
        kinds = {type(example) for examples in data.splits().values() for example in examples}
        context = self._config.model.most_tokens
        if kinds == {Labelled}:
            return ClassificationExamples(self.name, data, self._labels, self._reader, context, self._compute_lock)
        if Labelled in kinds:
            raise DataError(f"device '{self.name}'", "has completions and labels", "give it examples of one kind")
        if self._reader is None:
            found = "has prompts and completions, but the foundation model has no tokenizer to read them"
            raise DataError(f"device '{self.name}'", found, "give it images with labels")
        return CompletionExamples(self.name, data, self._reader, context, self._compute_lock)

    def handle(self, message: Message) -> Message:
        """Answer the edge. Raises ``UnexpectedMessage``, or ``OutOfBounds`` where a number cannot be meant."""
        self._check(message)
        match message:
            case ModelRelease():
                return self._install(message)
            case LengthsRequest():
                return self._own.measure_lengths()
            case SmashRequest():
                return self._smash(message.split)
            case BodyOutput(split="train"):
                return self._own.compute_gradient(message, self._held())
            case BodyOutput(split="validate" | "test"):
                return self._own.evaluate_output(message, self._held())
            case AnchorRelease() if self._domain is not None:
                self._domain.set_anchor(message)
                return Done()
            case AdapterRelease() if self._domain is not None:
                return self._take(self._domain, message)
            case FineTune() if self._domain is not None:
                return self._learn_alone(self._domain, message)
            case _:
                raise UnexpectedMessage(f"device '{self.name}'", type(message).__name__)

    def _check(self, message: Message) -> None:
        party = f"the edge of device '{self.name}'"
        match message:
            case BodyOutput():
                bounds.check_body_output(party, message)
            case FineTune():
                bounds.check_fine_tune_order(party, message, self._config.fine_tune)
            case AdapterRelease():
                bounds.check_integer(party, "the version of an adapter", message.version)

    def _install(self, release: ModelRelease) -> Done:
        parts = self._shared_weights.get_device_weights(release, self._settings)
        self._own.check_model(parts)
        self._check_sizes(int(parts.head.stack.config.hidden_size))
        self._parts = parts
        if self._settings.mode == "local":  # a body of its own, for its adapters; the weights are shared
            body = released(parts.release).body(self._settings.head_layers, parts.layout.tail_start)
            self._domain = DomainModel(body, parts.layout, self._compute_lock, len(self._labels))
        return Done()

    def _check_sizes(self, width: int) -> None:
        """Raise ``DataError`` where activations of its examples could not leave it."""
        wire = self._config.wire
        for split in get_args(Split):
            num_rows = self._own.count_rows(split)
            needed = num_rows * row_bytes(width, wire.smashed)
            if needed > wire.max_transfer_bytes:
                found = f"its {split} examples make {num_rows} rows of activations, {needed} bytes in {wire.smashed}"
                do = f"raise wire.max_transfer_bytes from {wire.max_transfer_bytes}, or give it fewer examples"
                raise DataError(f"device '{self.name}'", found, do)

    def _smash(self, split: Split) -> SmashedData:
        hidden, num_labels = self._own.compute_activations(split, self._held()), self._own.count_labels(split)
        return SmashedData(
            self.name,
            split,
            self._settings.head_layers,
            torch.tensor(hidden.lengths, dtype=torch.int32),
            torch.tensor(num_labels, dtype=torch.int32),
            hidden.rows_ND,
        )

    def _take(self, domain: DomainModel, release: AdapterRelease) -> Done:
        domain.install_adapter(release)
        if release.role == "relay":
            self._learning_inputs = None
        return Done()

    def _learn_alone(self, domain: DomainModel, order: FineTune) -> AdapterUpdate:
        if self._learning_inputs is None:
            smashed = Activations.from_smashed(self._smash("train"), *domain.placement())
            self._learning_inputs = domain.run_prefix(smashed)
        member = Member(self.name, self._learning_inputs)
        schedule = TrainingSchedule.for_edge_round(self._config, "device", self.name, order.cycle, order.edge_round)
        learned = domain.train_adapter([member], self._own_labels, schedule, self._progress)
        for error in learned.left.values():  # it has only itself
            raise error
        return AdapterUpdate(
            version=order.cycle + 1,
            base=domain.versions["domain"],
            num_examples=learned.num_examples,
            num_steps=learned.num_steps,
            loss=learned.loss,
            faults=(),
            tensors=domain.copy_adapter("domain"),
        )

    def _own_labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return {name: self._own.compute_gradient(output, self._held()) for name, output in outputs.items()}

    @property
    def generates_text(self) -> bool:
        """Whether its examples are for a model that writes, which callers can ask."""
        return isinstance(self._own, CompletionExamples)

    @property
    def test_tokens(self) -> Sequence[Tokens]:
        """Completions that it held out. They stay on it."""
        return self._own.tokens["test"] if isinstance(self._own, CompletionExamples) else []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The FM's. Raises ``SessionRefused`` where it takes images."""
        if self._reader is None:
            raise SessionRefused("an answer", "the foundation model takes images and writes no text", "ask another run")
        return self._reader

    def decoder_parts(self) -> tuple[Head, Tail]:
        """To write answers with. Raises ``UnexpectedMessage`` before it has a model, or ``SessionRefused``."""
        return self._held().decoder_parts()

    def _held(self) -> DeviceWeights:
        if self._parts is None:
            raise UnexpectedMessage(f"device '{self.name}', which has no model yet,", "request for its head or tail")
        return self._parts
