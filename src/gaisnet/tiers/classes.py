"""What is left for a device's tail where the body classifies: the loss of its own labels, and its gradient.

Shape legend: E examples, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.errors import WireFormatError
from gaisnet.messages import BodyOutput, BodyOutputGrad, EvaluationReport


def class_loss(output: BodyOutput, classes: Tensor) -> BodyOutputGrad:
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


def class_score(output: BodyOutput, classes: Tensor) -> EvaluationReport:
    """How many examples' likeliest class is theirs; arguments and errors as ``class_loss``."""
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
    labels_E = classes[which_E]
    if int(labels_E.max()) >= num_classes:
        raise WireFormatError(f"logits of {num_classes} classes where a label has number {int(labels_E.max())}")
    return labels_E
