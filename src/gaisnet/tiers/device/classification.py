"""A device's classification examples, for an encoder: head outputs, losses and scores.

The body goes to the end of the model, so the tail only computes the loss and its gradient.

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
    """Private examples for an encoder; see ``tiers.device.PrivateExamples``.

    Args:
        name: Name of the device.
        data: Its private examples.
        labels: Names of the domain's classes.
        tokenizer: The FM's; None where it takes images.
        context: Longest text in tokens; longer texts are cut at the end.
        compute_lock: Held while it computes.

    Raises:
        DataError: A label is not in ``labels``, or inputs are of different kinds.
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
            self._classes[split] = _class_indices([example.label for example in examples], labels, owner)
            self._inputs[split] = EncoderInputs([example.input for example in examples], tokenizer, context, owner)

    def check_model(self, parts: DeviceWeights) -> None:
        """Raise ``DataError`` where the model is a decoder."""
        if not isinstance(parts.head, EncoderHead):
            found = "has examples with labels, but the foundation model is a decoder, which writes"
            raise DataError(f"device '{self._name}'", found, "give it prompts and completions")

    def count_rows(self, split: Split) -> int:
        """Count one row per token; 0 for images, whose rows only the head knows."""
        return sum(map(len, self._inputs[split].ids))

    def compute_activations(self, split: Split, parts: DeviceWeights) -> Ragged:
        """Run the head on a split."""

        def run(inputs: Tensor) -> Tensor:
            with self._compute_lock.learning():
                hidden_BTD: Tensor = parts.head(inputs)
            return hidden_BTD

        return self._inputs[split].map_batches(run)

    def measure_lengths(self) -> Lengths:
        """Measure the examples; see ``tiers.device.PrivateExamples``."""
        lengths = [length for inputs in self._inputs.values() for length in inputs.lengths]
        num_examples = sum(len(classes) for classes in self._classes.values())
        return Lengths(num_examples, sum(length > self._context for length in lengths), max(lengths, default=0))

    def count_labels(self, split: Split) -> list[int]:
        """Return one label per example."""
        return [1] * len(self._classes[split])

    def compute_gradient(self, output: BodyOutput, parts: DeviceWeights) -> BodyOutputGrad:
        """Compute loss and gradient; see ``compute_class_gradient``."""
        return compute_class_gradient(output, self._classes[output.split])

    def evaluate_output(self, output: BodyOutput, parts: DeviceWeights) -> EvaluationReport:
        """Score the output; see ``evaluate_class_output``."""
        return evaluate_class_output(output, self._classes[output.split])


def _class_indices(names: Sequence[str], labels: Sequence[str], owner: str) -> Tensor:
    """Return class indices, int64 [E]. Raises ``DataError``."""
    for i, name in enumerate(names, start=1):
        if name not in labels:
            found = f"has the label '{name}', the domain's are: {', '.join(labels) or 'none'}"
            raise DataError(f"{owner}, example {i}", found, "correct it, or name it under 'labels' of the edge")
    return torch.tensor([labels.index(name) for name in names], dtype=torch.int64)


def compute_class_gradient(output: BodyOutput, classes: Tensor) -> BodyOutputGrad:
    """Return the sum of the losses, and the gradient of (sum / labels of the whole step) at the logits.

    Args:
        output: Logits [E, C].
        classes: Classes of all the device's examples in this split, int64.

    Raises:
        WireFormatError: The logits do not fit the examples, or have too few classes.
    """
    labels_E = _labels(output, classes)
    logits_EC = output.rows_ND.detach().requires_grad_()
    loss = F.cross_entropy(logits_EC.float(), labels_E, reduction="sum")
    (grad_EC,) = torch.autograd.grad(loss / output.num_labels_total, logits_EC)
    return BodyOutputGrad(output.step, loss.item(), grad_EC)


def evaluate_class_output(output: BodyOutput, classes: Tensor) -> EvaluationReport:
    """Count correct predictions and sum the losses; arguments and errors as for ``compute_class_gradient``."""
    labels_E = _labels(output, classes)
    num_correct = int((output.rows_ND.argmax(dim=-1) == labels_E).sum())
    loss = F.cross_entropy(output.rows_ND.float(), labels_E, reduction="sum")
    return EvaluationReport(len(labels_E), num_correct, len(labels_E), loss.item())


def _labels(output: BodyOutput, classes: Tensor) -> Tensor:
    indices_E, (num_rows, num_classes) = output.examples_E.long(), output.rows_ND.shape
    if not len(indices_E) or int(indices_E.min()) < 0 or int(indices_E.max()) >= len(classes):
        raise WireFormatError(f"example numbers that a device with {len(classes)} examples does not have")
    if num_rows != len(indices_E):
        raise WireFormatError(f"{num_rows} rows of logits for {len(indices_E)} examples")
    labels_E = classes[indices_E].to(output.rows_ND.device)
    if int(labels_E.max()) >= num_classes:
        raise WireFormatError(f"logits of {num_classes} classes where a label has number {int(labels_E.max())}")
    return labels_E
