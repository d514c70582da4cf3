"""Bounds on the numbers that other parties send, so that a dishonest party is excluded and cannot harm the others.

Bounds follow from the configuration, the model, earlier messages of the party and the median of the others. No honest
party can exceed them, so they never change an honest run.

Shape legend: E examples, N rows, D hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor
from transformers import PretrainedConfig

from gaisnet.adapters.state import AdapterTensors, check_same_shapes
from gaisnet.config.learning import FineTuneSettings
from gaisnet.errors import OutOfBounds, StaleAdapter
from gaisnet.messages import (
    MOST,
    AdapterUpdate,
    AnchorRelease,
    BodyOutput,
    BodyOutputGrad,
    EvaluationReport,
    FineTune,
    ModelRelease,
    SmashedData,
    Split,
)

MAX_LOSS = 1e4
"""Largest loss in nats per label token; differences between float16 logits are of this order at most."""
MAX_ACTIVATION = 1e8
"""Largest magnitude of an activation: far beyond any model's outliers, with a square that float32 can hold."""
MAX_SENTENCE = 2000
"""Most characters of an error that a party reports."""
_FEW = 100  # examples that any device may have, however few the others have
_ROUNDING_LOSS = 1e-3  # rounding may make a cross entropy of zero slightly negative
_ADAM = 7.3  # |m| / sqrt(v) of AdamW is at most (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)), by Cauchy and Schwarz
_ROUNDED = 0.25  # int4 transfer changes an adapter by less than this share of its largest number
_SLACK = 4.0  # on gradients: the device's tail and its rows may be quantized
_ABSURD = 10.0  # multiple of the limit, slack included, that no rounding explains
_AMPLIFIED = 100.0  # most amplification of a gradient by one layer of a tail


# -- general checks ----------------------------------------------------------------------------------------------------


def check_integer(party: str, what: str, found: int, least: int = 0, most: int = MOST) -> None:
    """Raise ``OutOfBounds`` unless an integer is in [least, most]."""
    if not least <= found <= most:
        raise OutOfBounds(party, what, _shown(found), f"a number from {least} to {most}")


def _shown(found: int) -> str:
    """Format an integer, even one with more digits than Python converts."""
    return str(found) if abs(found) < 10**20 else f"a number of {found.bit_length()} bits"


def check_loss(party: str, found: float, num_tokens: int = 1) -> None:
    """Raise ``OutOfBounds`` unless a loss in nats, summed over label tokens, is possible."""
    if not -_ROUNDING_LOSS * num_tokens <= found <= MAX_LOSS * num_tokens:
        raise OutOfBounds(party, "the loss", f"{found:.4g}", f"one from 0 to {MAX_LOSS * num_tokens:.4g}")


def check_faults(party: str, found: Sequence[str], most: int) -> None:
    """Raise ``OutOfBounds`` for more than ``most`` faults, or one longer than ``MAX_SENTENCE``."""
    check_integer(party, "the number of faults", len(found), 0, most)
    check_integer(party, "the length of a fault", max(map(len, found), default=0), 0, MAX_SENTENCE)


def find_outnumbering(counts: Mapping[str, int], ratio: float, granted: int) -> dict[str, OutOfBounds]:
    """Return devices that claim more than ``ratio`` times as many examples as the median of the others.

    Args:
        counts: Claimed numbers of examples, by device. A single device has no limit.
        ratio: Largest ratio to the median of the others.
        granted: Number of examples that any device may have; at least ``_FEW`` is used.
    """
    beyond = {}
    for name, count in counts.items():
        others = [other for each, other in counts.items() if each != name]
        most = max(ratio * median(others), granted, _FEW) if others else MOST
        if count > most:
            expected = f"at most {most:.0f} (faults.max_example_ratio)"
            beyond[name] = OutOfBounds(f"device '{name}'", "the number of examples", _shown(count), expected)
    return beyond


# -- requests ----------------------------------------------------------------------------------------------------------


def check_fine_tune_request(party: str, request: FineTune, settings: FineTuneSettings) -> None:
    """Raise ``OutOfBounds`` unless a training request is for an edge round of the configuration."""
    check_integer(party, "the cycle of a request", request.cycle)
    check_integer(party, "the edge round of a request", request.edge_round, 0, settings.edge_rounds - 1)


def check_body_output(party: str, output: BodyOutput) -> None:
    """Raise ``OutOfBounds`` where the numbers of a step are impossible."""
    check_integer(party, "the number of a step", output.step)
    check_integer(party, "the label tokens of a step", output.num_labels_total, 1)
    check_integer(party, "the examples of a step", len(output.examples_E), 1)


def check_anchor(party: str, found: AnchorRelease, hidden_size: int, most_positions: int) -> None:
    """Raise ``OutOfBounds`` where rows of generated text do not fit the model."""
    if not len(found.lengths_E):
        return
    width = found.hidden_ND.shape[1]
    check_integer(party, "the width of the anchor", width, hidden_size, hidden_size)
    check_integer(party, "the length of a generated text", int(found.lengths_E.max()), 1, most_positions)
    _within(party, "an activation of the anchor", _largest(found.hidden_ND), MAX_ACTIVATION)


# -- adapters ----------------------------------------------------------------------------------------------------------


def max_steps(num_examples: int, settings: FineTuneSettings) -> int:
    """Return the most optimizer steps that a party can make in a round."""
    return settings.passes_in_round * -(-num_examples // settings.batch_size)


def check_local_update(
    name: str, update: AdapterUpdate, base: int, start: AdapterTensors, cycle: int, settings: FineTuneSettings
) -> None:
    """Check the update of a local device against the adapter that it trained from.

    Args:
        name: The device's name.
        update: Its update.
        base: Version of the adapter that it was given.
        start: Tensors of that adapter.
        cycle: The cycle of the training.
        settings: Settings of the training.

    Raises:
        AdapterMismatch: Names or shapes differ, or a number is not finite.
        StaleAdapter: The update is based on another adapter.
        OutOfBounds: A number is impossible, or a tensor is further from ``start`` than training can move it.
    """
    party, settings = f"device '{name}'", settings.in_cycle(cycle)
    check_same_shapes(f"of {party}", start, update.tensors)
    if update.base != base:
        raise StaleAdapter(f"of {party}", base, update.base)
    check_integer(party, "the version of an update", update.version, cycle + 1, cycle + 1)
    check_integer(party, "the number of examples", update.num_examples, 1)
    check_integer(party, "the number of steps", update.num_steps, 0, max_steps(update.num_examples, settings))
    check_loss(party, update.loss)
    check_faults(party, update.faults, 0)
    check_distance(party, start, update.tensors, update.num_steps, settings)


def check_edge_update(
    party: str,
    update: AdapterUpdate,
    base: int,
    start: AdapterTensors,
    cycle: int,
    settings: FineTuneSettings,
    num_devices: int,
) -> None:
    """Check an edge's update against its release; arguments and errors as for ``check_local_update``.

    The distance of an update that is based on another release is not checked: the cloud refuses such an update.
    """
    settings = settings.in_cycle(cycle)
    check_same_shapes(f"of {party}", start, update.tensors)
    check_integer(party, "the version of an update", update.version, cycle + 1, cycle + 1)
    check_integer(party, "the release that an update is based on", update.base)
    check_integer(party, "the number of examples", update.num_examples, 1)
    check_integer(party, "the number of steps", update.num_steps)
    check_loss(party, update.loss)
    check_faults(party, update.faults, settings.edge_rounds * num_devices)
    if update.base != base:
        return
    products = {key for key in start if settings.average == "products" and ".lora_" in key}
    unchanged = {key: tensor for key, tensor in start.items() if key not in products}
    check_distance(party, unchanged, update.tensors, update.num_steps, settings)
    check_norms(party, {key: start[key] for key in products}, update.tensors, update.num_steps, settings)


def check_distance(
    party: str, start: AdapterTensors, found: AdapterTensors, num_steps: int, settings: FineTuneSettings
) -> None:
    """Raise ``OutOfBounds`` where a number is further from its start than AdamW can move it in so many steps."""
    decayed = min(1.0, num_steps * settings.learning_rate * settings.weight_decay)
    for key, before in start.items():
        travel = _ADAM * settings.learning_rate * num_steps + decayed * _largest(before)
        most = (1.0 + _ROUNDED) * travel + _ROUNDED * _largest(before)
        moved = _largest(found[key].to(before).double() - before.double())
        _within(party, f"how far '{key}' has moved in {num_steps} steps", moved, most)


def check_norms(
    party: str, start: AdapterTensors, found: AdapterTensors, num_steps: int, settings: FineTuneSettings
) -> None:
    """Raise ``OutOfBounds`` where a LoRA from averaged products is larger than AdamW can make it in so many steps.

    Averaging products gives new factors. Their squared norms are the sum of the singular values, which is at most the
    product of the norms of the old factors.
    """
    travel = _ADAM * settings.learning_rate * num_steps
    for key_a in (key for key in start if ".lora_A." in key):
        pair = (key_a, key_a.replace(".lora_A.", ".lora_B."))
        most = max(float(start[key].double().norm()) + travel * start[key].numel() ** 0.5 for key in pair)
        for key in pair:
            size = float(found[key].double().norm())
            _within(party, f"the norm of '{key}' after {num_steps} steps", size, (1.0 + _ROUNDED) * most)


def _within(party: str, what: str, found: float, most: float) -> None:
    if not found <= most:
        raise OutOfBounds(party, what, f"{found:.3g}", f"at most {most:.3g}")


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


# -- activations -------------------------------------------------------------------------------------------------------


def max_positions(model: PretrainedConfig, context: int) -> int:
    """Return the most positions of an example: the context for texts, patches and [CLS] for images."""
    if not hasattr(model, "image_size"):
        return context
    sides = [size if isinstance(size, tuple | list) else (size, size) for size in (model.image_size, model.patch_size)]
    (height, width), (patch_height, patch_width) = sides
    return int(1 + (height // patch_height) * (width // patch_width))


def check_smashed(
    name: str, split: Split, found: SmashedData, next_layer: int, width: int, most_positions: int, classifies: bool
) -> None:
    """Raise ``OutOfBounds`` where activations cannot come from a device's examples.

    Args:
        name: The device's name.
        split: The requested split.
        found: The activations that it sent.
        next_layer: First layer after its head.
        width: Hidden size of the model.
        most_positions: Most positions of an example.
        classifies: Whether an example has exactly one label.
    """
    party = f"device '{name}'"
    actual = (found.owner, found.split, found.next_layer, found.hidden_ND.shape[1])
    expected = (name, split, next_layer, width)
    if actual != expected:
        raise OutOfBounds(party, "smashed data (owner, split, next layer, width)", str(actual), str(expected))
    check_integer(party, "the number of examples", len(found.lengths_E), 1)
    check_integer(party, "the length of an example", int(found.lengths_E.max()), 1, most_positions)
    check_integer(
        party, "the labels of an example", int(found.num_labels_E.max()), 1, 1 if classifies else most_positions
    )
    _within(party, "an activation", _largest(found.hidden_ND), MAX_ACTIVATION)


# -- gradients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientBounds:
    """Bounds on the gradient of a label's loss at a row of a body's output.

    The gradient of a cross entropy at its logits is p - y, with a norm of at most sqrt(2). Through a vocabulary head it
    is at most twice the norm of the head's longest row. An RMS norm multiplies that by at most its largest weight,
    divided by the row's root mean square.

    Attributes:
        at_row: Largest norm at a row, of root mean square 1 where ``normed``.
        normed: Whether a norm and a vocabulary head follow; otherwise the rows are logits.
    """

    at_row: float
    normed: bool

    @classmethod
    def from_release(cls, release: ModelRelease, num_tail_layers: int, is_encoder: bool) -> "GradientBounds":
        """Return the bounds for a body of this model. Raises ``ModelError`` where the release has no end."""
        if is_encoder:
            return cls(2.0**0.5, normed=False)
        named = release.tensors
        head_VD = named.get("lm_head.weight", named["embed_tokens.weight"])
        longest_row = float(torch.linalg.vector_norm(head_VD, dim=-1, dtype=torch.float32).max())
        return cls(
            2.0 * longest_row * _largest(named["norm.weight"].float()) * _AMPLIFIED**num_tail_layers, normed=True
        )

    def norm_limit(self, rows_ND: Tensor, num_labels_total: int) -> float:
        """Return the largest norm of an owner's gradient of a step's mean loss at the rows that it was sent."""
        each_N = torch.full((len(rows_ND),), self.at_row, dtype=torch.float64)
        if self.normed:
            each_N /= rows_ND.double().square().mean(dim=-1).sqrt().clamp_min(1e-6).cpu()
        return _SLACK * float(each_N.norm()) / num_labels_total


def clip_gradient(name: str, reply: BodyOutputGrad, limit: float) -> BodyOutputGrad:
    """Return the reply with its gradient clipped to ``limit``, which no honest gradient exceeds.

    Raises ``OutOfBounds`` where rounding cannot explain the norm.
    """
    norm = float(reply.grad_ND.double().norm())
    if norm <= limit:
        return reply
    if norm > _ABSURD * limit:
        raise OutOfBounds(f"device '{name}'", "the norm of a gradient", f"{norm:.3g}", f"at most {limit:.3g}")
    return replace(reply, grad_ND=(reply.grad_ND.double() * (limit / norm)).to(reply.grad_ND))


# -- reports -----------------------------------------------------------------------------------------------------------


def check_report(party: str, found: EvaluationReport, most_examples: int = MOST, most_tokens: int = MOST) -> None:
    """Raise ``OutOfBounds`` where a report is impossible for at most so many examples and label tokens."""
    check_integer(party, "the number of examples", found.num_examples, 1, most_examples)
    check_integer(party, "the number of right ones", found.num_correct, 0, found.num_examples)
    check_integer(party, "the number of label tokens", found.num_tokens, found.num_examples, most_tokens)
    check_loss(party, found.loss_sum, found.num_tokens)
