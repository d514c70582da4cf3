"""Bounds on the numbers that another party sends: one that lies is left out by name, and harms nobody else.

A bound follows from what is known: the configuration, the model, what the party sent before, the median of the others.
Each is one that no honest party can pass, so honest runs are the same with it and without it.

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
"""In nats per label token: no logits that float16 can hold are further apart than some times this."""
MAX_ACTIVATION = 1e8
"""In magnitude: far beyond any model's outliers, and its square is still finite in float32."""
MAX_SENTENCE = 2000
"""Characters of what a party says went wrong."""
_FEW = 100  # examples that a device may have however few the others have
_ROUNDING_LOSS = 1e-3  # a cross entropy of nothing may be a little below zero
_ADAM = 7.3  # |m| / sqrt(v) of AdamW is at most (1 - b1) / sqrt((1 - b2) (1 - b1**2 / b2)), by Cauchy and Schwarz
_ROUNDED = 0.25  # an adapter that crosses in int4 comes back with errors of less than this share of its largest number
_SLACK = 4.0  # on gradients: the device's tail and the rows that it sees may be in few bits
_ABSURD = 10.0  # times the limit, slack included, is no rounding
_AMPLIFIED = 100.0  # by a layer of a tail, on a gradient's way back through it


# -- words for all -----------------------------------------------------------------------------------------------------


def check_integer(party: str, what: str, found: int, least: int = 0, most: int = MOST) -> None:
    """Raise ``OutOfBounds`` unless a whole number is in [least, most]."""
    if not least <= found <= most:
        raise OutOfBounds(party, what, _shown(found), f"a number from {least} to {most}")


def _shown(found: int) -> str:
    """A number as text, even where it has so many digits that Python would refuse."""
    return str(found) if abs(found) < 10**20 else f"a number of {found.bit_length()} bits"


def check_loss(party: str, found: float, num_tokens: int = 1) -> None:
    """Raise ``OutOfBounds`` unless a loss in nats, summed over label tokens, is one that there can be."""
    if not -_ROUNDING_LOSS * num_tokens <= found <= MAX_LOSS * num_tokens:
        raise OutOfBounds(party, "the loss", f"{found:.4g}", f"one from 0 to {MAX_LOSS * num_tokens:.4g}")


def check_faults(party: str, found: Sequence[str], most: int) -> None:
    """Raise ``OutOfBounds`` unless there are at most so many, none of them longer than ``MAX_SENTENCE``."""
    check_integer(party, "the number of faults", len(found), 0, most)
    check_integer(party, "the length of a fault", max(map(len, found), default=0), 0, MAX_SENTENCE)


def find_outnumbering(counts: Mapping[str, int], ratio: float, granted: int) -> dict[str, OutOfBounds]:
    """Devices that say they have more than ``ratio`` times as many examples as the median of the others.

    ``granted``: examples that any of them may have; it is ``_FEW`` at least. One that is alone has nobody to outweigh.
    """
    beyond = {}
    for name, count in counts.items():
        others = [other for each, other in counts.items() if each != name]
        most = max(ratio * median(others), granted, _FEW) if others else MOST
        if count > most:
            expected = f"at most {most:.0f} (faults.max_example_ratio)"
            beyond[name] = OutOfBounds(f"device '{name}'", "the number of examples", _shown(count), expected)
    return beyond


# -- orders ------------------------------------------------------------------------------------------------------------


def check_fine_tune_order(party: str, order: FineTune, settings: FineTuneSettings) -> None:
    """Raise ``OutOfBounds`` where an order to learn is for no edge round that there is."""
    check_integer(party, "the cycle of an order", order.cycle)
    check_integer(party, "the edge round of an order", order.edge_round, 0, settings.edge_rounds - 1)


def check_body_output(party: str, output: BodyOutput) -> None:
    """Raise ``OutOfBounds`` where the numbers of a step cannot be meant."""
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
    """Most optimizer steps that a party can make in a round."""
    return settings.passes_in_round * -(-num_examples // settings.batch_size)


def check_local_update(
    name: str, update: AdapterUpdate, base: int, start: AdapterTensors, cycle: int, settings: FineTuneSettings
) -> None:
    """Hold what a local device says that it learned against what it was given.

    Args:
        name: The device's name.
        update: The update that it sent.
        base: Version of the adapter that it was given.
        start: Tensors of it.
        cycle: The cycle in which it learned.
        settings: How it learned.

    Raises:
        AdapterMismatch: Other tensors, or numbers that are not finite.
        StaleAdapter: It grew out of another adapter.
        OutOfBounds: Another number cannot be meant, or a tensor is further from ``start`` than learning can take it.
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
    """Hold an edge's update against the release that it was given; arguments and errors as for ``local_update``.

    Nothing is known of how far one may be that grew out of another release: whoever takes it in refuses that.
    """
    settings = settings.in_cycle(cycle)
    check_same_shapes(f"of {party}", start, update.tensors)
    check_integer(party, "the version of an update", update.version, cycle + 1, cycle + 1)
    check_integer(party, "the release that an update grew out of", update.base)
    check_integer(party, "the number of examples", update.num_examples, 1)
    check_integer(party, "the number of steps", update.num_steps)
    check_loss(party, update.loss)
    check_faults(party, update.faults, settings.edge_rounds * num_devices)
    if update.base != base:
        return
    products = {key for key in start if settings.average == "products" and ".lora_" in key}
    as_it_was = {key: tensor for key, tensor in start.items() if key not in products}
    check_distance(party, as_it_was, update.tensors, update.num_steps, settings)
    check_norms(party, {key: start[key] for key in products}, update.tensors, update.num_steps, settings)


def check_distance(
    party: str, start: AdapterTensors, found: AdapterTensors, num_steps: int, settings: FineTuneSettings
) -> None:
    """Raise ``OutOfBounds`` where a number is further from its start than AdamW comes in so many steps."""
    decayed = min(1.0, num_steps * settings.learning_rate * settings.weight_decay)
    for key, before in start.items():
        reach = _ADAM * settings.learning_rate * num_steps + decayed * _largest(before)
        most = (1.0 + _ROUNDED) * reach + _ROUNDED * _largest(before)
        moved = _largest(found[key].to(before).double() - before.double())
        _within(party, f"how far '{key}' has moved in {num_steps} steps", moved, most)


def check_norms(
    party: str, start: AdapterTensors, found: AdapterTensors, num_steps: int, settings: FineTuneSettings
) -> None:
    """Raise ``OutOfBounds`` where a LoRA whose products were averaged is larger than AdamW makes it in so many steps.

    An average of products has new factors: their squared norm is the sum of the singular values, and so at most the
    product of the norms of the old ones.
    """
    reach = _ADAM * settings.learning_rate * num_steps
    for key_a in (key for key in start if ".lora_A." in key):
        pair = (key_a, key_a.replace(".lora_A.", ".lora_B."))
        most = max(float(start[key].double().norm()) + reach * start[key].numel() ** 0.5 for key in pair)
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
    """Positions of an example: of a text the context, of an image its patches and [CLS]."""
    if not hasattr(model, "image_size"):
        return context
    sides = [size if isinstance(size, tuple | list) else (size, size) for size in (model.image_size, model.patch_size)]
    (height, width), (patch_height, patch_width) = sides
    return int(1 + (height // patch_height) * (width // patch_width))


def check_smashed(
    name: str, split: Split, found: SmashedData, next_layer: int, width: int, most_positions: int, classifies: bool
) -> None:
    """Raise ``OutOfBounds`` where activations cannot be those of examples that a device has.

    Args:
        name: The device's name.
        split: The split that it was asked for.
        found: The activations that it sent.
        next_layer: Where its head ends.
        width: Hidden size of the model.
        most_positions: Longest example, in positions.
        classifies: Whether one label belongs to an example.
    """
    party = f"device '{name}'"
    said = (found.owner, found.split, found.next_layer, found.hidden_ND.shape[1])
    expected = (name, split, next_layer, width)
    if said != expected:
        raise OutOfBounds(party, "smashed data (owner, split, next layer, width)", str(said), str(expected))
    check_integer(party, "the number of examples", len(found.lengths_E), 1)
    check_integer(party, "the length of an example", int(found.lengths_E.max()), 1, most_positions)
    check_integer(
        party, "the labels of an example", int(found.num_labels_E.max()), 1, 1 if classifies else most_positions
    )
    _within(party, "an activation", _largest(found.hidden_ND), MAX_ACTIVATION)


# -- gradients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientBounds:
    """The steepest that the loss of a label can be at a row of a body's output.

    The gradient of a cross entropy at its logits is p - y, of norm sqrt(2) at most. A vocabulary head makes of it at
    most twice its longest row, and an RMS norm that times its largest weight over the row's root mean square.

    Attributes:
        at_row: For a row of root mean square 1 where ``normed``, else for any row.
        normed: Whether a norm and a vocabulary head follow; otherwise the rows are logits.
    """

    at_row: float
    normed: bool

    @classmethod
    def from_release(cls, release: ModelRelease, num_tail_layers: int, is_encoder: bool) -> "GradientBounds":
        """For rows that leave a body of this model. Raises ``ModelError`` where the release has no end."""
        if is_encoder:
            return cls(2.0**0.5, normed=False)
        named = release.tensors
        head_VD = named.get("lm_head.weight", named["embed_tokens.weight"])
        longest_row = float(torch.linalg.vector_norm(head_VD, dim=-1, dtype=torch.float32).max())
        return cls(
            2.0 * longest_row * _largest(named["norm.weight"].float()) * _AMPLIFIED**num_tail_layers, normed=True
        )

    def norm_limit(self, rows_ND: Tensor, num_labels_total: int) -> float:
        """Largest norm of an owner's gradient of the mean loss of a step, at the rows that it was sent."""
        each_N = torch.full((len(rows_ND),), self.at_row, dtype=torch.float64)
        if self.normed:
            each_N /= rows_ND.double().square().mean(dim=-1).sqrt().clamp_min(1e-6).cpu()
        return _SLACK * float(each_N.norm()) / num_labels_total


def clip_gradient(name: str, reply: BodyOutputGrad, limit: float) -> BodyOutputGrad:
    """The gradient as it is, or clipped to a norm that no honest one passes.

    Raises ``OutOfBounds`` where it is so large that no rounding explains it.
    """
    norm = float(reply.grad_ND.double().norm())
    if norm <= limit:
        return reply
    if norm > _ABSURD * limit:
        raise OutOfBounds(f"device '{name}'", "the norm of a gradient", f"{norm:.3g}", f"at most {limit:.3g}")
    return replace(reply, grad_ND=(reply.grad_ND.double() * (limit / norm)).to(reply.grad_ND))


# -- scores ------------------------------------------------------------------------------------------------------------


def check_report(party: str, found: EvaluationReport, most_examples: int = MOST, most_tokens: int = MOST) -> None:
    """Raise ``OutOfBounds`` where counts and sums cannot be those of at most so many examples and label tokens."""
    check_integer(party, "the number of examples", found.num_examples, 1, most_examples)
    check_integer(party, "the number of right ones", found.num_correct, 0, found.num_examples)
    check_integer(party, "the number of label tokens", found.num_tokens, found.num_examples, most_tokens)
    check_loss(party, found.loss_sum, found.num_tokens)
