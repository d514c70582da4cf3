"""A device: the only place that sees private examples. It has head and tail or, if local, the whole DM."""

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
    """A device's private examples, and computations on them with its parts of the model."""

    def check_model(self, parts: DeviceWeights) -> None:
        """Raise ``DataError`` where the examples are for another kind of model."""

    def count_rows(self, split: Split) -> int:
        """Count the activation rows of a split; 0 where only the head knows."""

    def compute_activations(self, split: Split, parts: DeviceWeights) -> Ragged:
        """Run the head on a split, without gradients."""

    def count_labels(self, split: Split) -> list[int]:
        """Count the rows that carry a label, for each example."""

    def measure_lengths(self) -> Lengths:
        """Measure the lengths of all examples."""

    def compute_gradient(self, output: BodyOutput, parts: DeviceWeights) -> BodyOutputGrad:
        """Return the sum of the losses and the gradient of (sum / labels of the step). Raises ``WireFormatError``."""

    def evaluate_output(self, output: BodyOutput, parts: DeviceWeights) -> EvaluationReport:
        """Count correct predictions and sum the losses. Raises ``WireFormatError``."""


class Device:
    """A device that answers its edge.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        tokenizer: The FM's; None for a model of images.
        data: Its private examples.
        progress: Told about a local device's training.
        compute_lock: The machine's lock, held while it computes; None for a new one.
        shared_weights: Frozen parts that the machine's devices share; None for new ones.
        trains: Whether it needs training examples.
        present: Whether its examples are available; without them it can only answer.
        labels: Names of its domain's classes, if any.

    Raises:
        DataError: A needed split is empty, a completion is longer than the context, or a label is not in ``labels``.
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
        trains: bool = True,
        present: bool = True,
        labels: Sequence[str] = (),
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._progress = progress
        self._compute_lock = compute_lock or ComputeLock()
        self._shared_weights = shared_weights or SharedWeights(config, self._compute_lock)
        self._tokenizer = tokenizer
        self._labels = labels
        needs_validation = trains and config.absorb.validation_share > 0.0
        for split, needed in (("train", trains), ("test", present), ("validate", needs_validation)):
            if needed and not getattr(data, split):
                do = (
                    "call DeviceData.with_validation_split"
                    if split == "validate"
                    else "give it some, or remove the device"
                )
                raise DataError(f"device '{self.name}'", f"has no {split} examples", do)
        self._examples = self._read(data)
        self._weights: DeviceWeights | None = None
        self._domain: DomainModel | None = None
        self._training_inputs: Activations | None = None

    def _read(self, data: DeviceData[Any]) -> PrivateExamples:
        """Read completion or classification examples."""
        kinds = {type(example) for examples in data.splits().values() for example in examples}
        context = self._config.model.most_tokens
        if kinds == {Labelled}:
            return ClassificationExamples(self.name, data, self._labels, self._tokenizer, context, self._compute_lock)
        if Labelled in kinds:
            raise DataError(f"device '{self.name}'", "has completions and labels", "give it examples of one kind")
        if self._tokenizer is None:
            found = "has prompts and completions, but the foundation model has no tokenizer to read them"
            raise DataError(f"device '{self.name}'", found, "give it images with labels")
        return CompletionExamples(self.name, data, self._tokenizer, context, self._compute_lock)

    def handle(self, message: Message) -> Message:
        """Answer the edge. Raises ``UnexpectedMessage``, or ``OutOfBounds`` for an impossible number."""
        self._check_message(message)
        match message:
            case ModelRelease():
                return self._install(message)
            case LengthsRequest():
                return self._examples.measure_lengths()
            case SmashRequest():
                return self._smash(message.split)
            case BodyOutput(split="train"):
                return self._examples.compute_gradient(message, self._require_weights())
            case BodyOutput(split="validate" | "test"):
                return self._examples.evaluate_output(message, self._require_weights())
            case AnchorRelease() if self._domain is not None:
                self._domain.set_anchor(message)
                return Done()
            case AdapterRelease() if self._domain is not None:
                return self._install_adapter(self._domain, message)
            case FineTune() if self._domain is not None:
                return self._train_locally(self._domain, message)
            case _:
                raise UnexpectedMessage(f"device '{self.name}'", type(message).__name__)

    def _check_message(self, message: Message) -> None:
        party = f"the edge of device '{self.name}'"
        match message:
            case BodyOutput():
                bounds.check_body_output(party, message)
            case FineTune():
                bounds.check_fine_tune_request(party, message, self._config.fine_tune)
            case AdapterRelease():
                bounds.check_integer(party, "the version of an adapter", message.version)

    def _install(self, release: ModelRelease) -> Done:
        parts = self._shared_weights.get_device_weights(release, self._settings)
        self._examples.check_model(parts)
        self._check_sizes(int(parts.head.stack.config.hidden_size))
        self._weights = parts
        if self._settings.mode == "local":  # its own body, for its adapters; weights are shared
            body = released(parts.release).body(self._settings.head_layers, parts.layout.tail_start)
            self._domain = DomainModel(body, parts.layout, self._compute_lock, len(self._labels))
        return Done()

    def _check_sizes(self, width: int) -> None:
        """Raise ``DataError`` where the activations of a split exceed the limit of a transfer."""
        wire = self._config.wire
        for split in get_args(Split):
            num_rows = self._examples.count_rows(split)
            needed = num_rows * row_bytes(width, wire.smashed)
            if needed > wire.max_transfer_bytes:
                found = f"its {split} examples make {num_rows} rows of activations, {needed} bytes in {wire.smashed}"
                do = f"raise wire.max_transfer_bytes from {wire.max_transfer_bytes}, or give it fewer examples"
                raise DataError(f"device '{self.name}'", found, do)

    def _smash(self, split: Split) -> SmashedData:
        hidden, num_labels = (
            self._examples.compute_activations(split, self._require_weights()),
            self._examples.count_labels(split),
        )
        return SmashedData(
            self.name,
            split,
            self._settings.head_layers,
            torch.tensor(hidden.lengths, dtype=torch.int32),
            torch.tensor(num_labels, dtype=torch.int32),
            hidden.rows_ND,
        )

    def _install_adapter(self, domain: DomainModel, release: AdapterRelease) -> Done:
        domain.install_adapter(release)
        if release.role == "relay":
            self._training_inputs = None
        return Done()

    def _train_locally(self, domain: DomainModel, request: FineTune) -> AdapterUpdate:
        if self._training_inputs is None:
            smashed = Activations.from_smashed(self._smash("train"), *domain.placement())
            self._training_inputs = domain.run_prefix(smashed)
        member = Member(self.name, self._training_inputs)
        schedule = TrainingSchedule.for_edge_round(self._config, "device", self.name, request.cycle, request.edge_round)
        result = domain.train_adapter([member], self._compute_gradients, schedule, self._progress)
        for error in result.excluded.values():  # the only member is this device
            raise error
        return AdapterUpdate(
            version=request.cycle + 1,
            base=domain.versions["domain"],
            num_examples=result.num_examples,
            num_steps=result.num_steps,
            loss=result.loss,
            faults=(),
            tensors=domain.copy_adapter("domain"),
        )

    def _compute_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        return {
            name: self._examples.compute_gradient(output, self._require_weights()) for name, output in outputs.items()
        }

    @property
    def generates_text(self) -> bool:
        """Whether its examples are for a model that generates text and can be served."""
        return isinstance(self._examples, CompletionExamples)

    @property
    def test_tokens(self) -> Sequence[Tokens]:
        """Test completions, which stay on the device."""
        return self._examples.tokens["test"] if isinstance(self._examples, CompletionExamples) else []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The FM's tokenizer. Raises ``SessionRefused`` for a model of images."""
        if self._tokenizer is None:
            raise SessionRefused("an answer", "the foundation model takes images and writes no text", "ask another run")
        return self._tokenizer

    def decoder_parts(self) -> tuple[Head, Tail]:
        """Return head and tail of a decoder. Raises ``UnexpectedMessage`` without a model, or ``SessionRefused``."""
        return self._require_weights().decoder_parts()

    def _require_weights(self) -> DeviceWeights:
        if self._weights is None:
            raise UnexpectedMessage(f"device '{self.name}', which has no model yet,", "request for its head or tail")
        return self._weights
