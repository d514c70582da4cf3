"""A device's examples whose classes the model tells apart: what its head makes of them, and the loss of its labels.

The body goes to the end of the model, so for the tail only the loss is left, and its gradient.

Shape legend: E examples, C classes, B examples of a batch, T positions, D hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from gaisnet.compute_lock import ComputeLock
from gaisnet.data.examples import DeviceData, Labelled
from gaisnet.errors import DataError, WireFormatError
from gaisnet.messages import BodyOutput, BodyOutputGrad, EvaluationReport, Lengths, Split
from gaisnet.models.encoders import EncoderHead
from gaisnet.models.ragged import Ragged
from gaisnet.tiers.device.shared_weights import DeviceWeights
from gaisnet.tiers.split.inputs import EncoderInputs


class ClassificationExamples:
    """What a device does with its examples where the model is an encoder; see ``tiers.device.PrivateExamples``.

    Args:
        name: Of the device.
        data: Its private examples.
        labels: Names of the domain's classes.
        tokenizer: The FM's; None where it takes images.
        context: Longest text in tokens; longer ones lose their end.
        compute_lock: Held while it computes.

    Raises:
        DataError: A label that is not among ``labels``, or inputs that are not all of one kind.
    """

    def __init__(
        self,
        name: str,
        data: DeviceData[Labelled],
        labels: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None,
        context: int,
        compute_lock: ComputeLock,
    ) -> None:
        self._name = name
        self._compute_lock = compute_lock
        self._context = context
        self._classes, self._inputs = dict[Split, Tensor](), dict[Split, EncoderInputs]()
        for split, examples in data.splits().items():
            owner = f"device '{name}', {split}"
            self._classes[split] = _numbers([example.label for example in examples], labels, owner)
            self._inputs[split] = EncoderInputs([example.input for example in examples], tokenizer, context, owner)

    def check_model(self, parts: DeviceWeights) -> None:
        """Raise ``DataError`` where the model writes."""
        if not isinstance(parts.head, EncoderHead):
            found = "has examples with labels, but the foundation model is a decoder, which writes"
            raise DataError(f"device '{self._name}'", found, "give it prompts and completions")

    def count_rows(self, split: Split) -> int:
        """One for every token; of images only the head can tell."""
        return sum(map(len, self._inputs[split].ids))

    def compute_activations(self, split: Split, parts: DeviceWeights) -> Ragged:
        """What the head makes of a split."""

        def run(inputs: Tensor) -> Tensor:
            with self._compute_lock.learning():
                hidden_BTD: Tensor = parts.head(inputs)
            return hidden_BTD

        return self._inputs[split].map_batches(run)

    def measure_lengths(self) -> Lengths:
        """See ``tiers.device.PrivateExamples``."""
        lengths = [length for inputs in self._inputs.values() for length in inputs.lengths]
        num_examples = sum(len(classes) for classes in self._classes.values())
        return Lengths(num_examples, sum(length > self._context for length in lengths), max(lengths, default=0))

    def count_labels(self, split: Split) -> list[int]:
        """One, of every example."""
        return [1] * len(self._classes[split])

    def compute_gradient(self, output: BodyOutput, parts: DeviceWeights) -> BodyOutputGrad:
        """See ``compute_class_gradient``."""
        return compute_class_gradient(output, self._classes[output.split])

    def evaluate_output(self, output: BodyOutput, parts: DeviceWeights) -> EvaluationReport:
        """See ``evaluate_class_output``."""
        return evaluate_class_output(output, self._classes[output.split])


def _numbers(names: Sequence[str], labels: Sequence[str], owner: str) -> Tensor:
    """Numbers of classes, int64 [E]."""
    for i, name in enumerate(names, start=1):
        if name not in labels:
            found = f"has the label '{name}', the domain's are: {', '.join(labels) or 'none'}"
            raise DataError(f"{owner}, example {i}", found, "correct it, or name it under 'labels' of the edge")
    return torch.tensor([labels.index(name) for name in names], dtype=torch.int64)


def compute_class_gradient(output: BodyOutput, classes: Tensor) -> BodyOutputGrad:
    """Sum of the losses, and the gradient of (sum / labels of the whole step) at the logits.

    Args:
        output: Logits [E, C].
        classes: Of all the device's examples of this split, int64.

    Raises:
        WireFormatError: The logits do not fit the examples, or have fewer classes.
    """
    labels_E = _labels(output, classes)
    logits_EC = output.rows_ND.detach().requires_grad_()
    loss = F.cross_entropy(logits_EC.float(), labels_E, reduction="sum")
    (grad_EC,) = torch.autograd.grad(loss / output.num_labels_total, logits_EC)
    return BodyOutputGrad(output.step, loss.item(), grad_EC)


def evaluate_class_output(output: BodyOutput, classes: Tensor) -> EvaluationReport:
    """How many examples' likeliest class is theirs; arguments and errors as ``compute_class_gradient``."""
    labels_E = _labels(output, classes)
    num_correct = int((output.rows_ND.argmax(dim=-1) == labels_E).sum())
    loss = F.cross_entropy(output.rows_ND.float(), labels_E, reduction="sum")
    return EvaluationReport(len(labels_E), num_correct, len(labels_E), loss.item())


def _labels(output: BodyOutput, classes: Tensor) -> Tensor:
    which_E, (num_rows, num_classes) = output.examples_E.long(), output.rows_ND.shape
    if not len(which_E) or int(which_E.min()) < 0 or int(which_E.max()) >= len(classes):
        raise WireFormatError(f"example numbers that a device with {len(classes)} examples does not have")
    if num_rows != len(which_E):
        raise WireFormatError(f"{num_rows} rows of logits for {len(which_E)} examples")
    labels_E = classes[which_E].to(output.rows_ND.device)
    if int(labels_E.max()) >= num_classes:
        raise WireFormatError(f"logits of {num_classes} classes where a label has number {int(labels_E.max())}")
    return labels_E
