"""Batches of a split learning step: their rows, the outputs for each owner, and the gradients from them.

Only rows that carry a label go to their owner (U-shaped split learning, Vepakomma et al., arXiv 1812.00564). Generated
text may be in the same forward and backward pass: see ``AnchorLoss``.

Shape legend: E examples, T positions of an example, N rows, D hidden size.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from gaisnet.errors import GaisnetError, NotFinite, OutOfBounds, WireFormatError
from gaisnet.messages import BodyOutput, BodyOutputGrad
from gaisnet.models.packing import Packing
from gaisnet.models.ragged import relative_square
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations, RowSelection, select_tail_rows

Outcome = BodyOutputGrad | GaisnetError
RequestGradients = Callable[[Mapping[str, BodyOutput]], Mapping[str, Outcome]]
"""A function that requests gradients from all owners in a step, by name; an error stands for a missing gradient."""

Picked = tuple[int, int]
"""Index of a member, and index of one of its examples."""


@dataclass(frozen=True)
class Member:
    """A device in a cohort, with its examples at the suffix's input."""

    name: str
    inputs: Activations


@dataclass(frozen=True)
class AnchorLoss:
    """A loss that keeps the suffix near the FM's output on generated text.

    See learning without forgetting (Li and Hoiem, arXiv 1606.09282).

    Attributes:
        sequences: The text at the suffix's input, [T, D] each.
        targets_ND: Target outputs at every position but the first of each sequence, an attention sink whose huge norm
            would dominate the loss.
        weight: Weight of the loss, the mean of |found - target|^2 / |target|^2.
    """

    sequences: Sequence[Tensor]
    targets_ND: Tensor
    weight: float

    def compute_gradient(self, found_ND: Tensor) -> Tensor:
        """Return the gradient of the weighted loss at the suffix's output."""
        leaf_ND = found_ND.detach().requires_grad_()
        loss = self.weight * relative_square(leaf_ND, self.targets_ND)
        (grad_ND,) = torch.autograd.grad(loss, leaf_ND)
        return grad_ND


@dataclass(frozen=True)
class _Share:
    """One member's part of a batch."""

    rows: slice  # of the selected rows
    num_labels: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Examples of several members, grouped by member, followed by the sequences of the anchor loss."""

    rows_1ND: Tensor
    packing: Packing
    selected_N: Tensor  # indices of the output rows for owners and anchor loss
    shares: Mapping[str, _Share]
    anchor_loss: AnchorLoss | None

    @classmethod
    def from_picks(
        cls, members: Sequence[Member], picks: Sequence[Picked], anchor_loss: AnchorLoss | None, selection: RowSelection
    ) -> "Batch":
        """Collect sorted ``picks``; ``selection`` says which rows go to their owners."""
        lengths = [members[m].inputs.hidden.lengths[e] for m, e in picks]
        num_labels = [members[m].inputs.num_labels[e] for m, e in picks]
        hidden = {m: members[m].inputs.hidden.sequences() for m, _ in picks}
        sequences, owned = [hidden[m][e] for m, e in picks], select_tail_rows(lengths, num_labels, selection)
        ends = list(accumulate((len(each) for each in owned), initial=0))
        shares = {}
        for m in hidden:
            mine = [i for i, (owner, _) in enumerate(picks) if owner == m]
            rows = slice(ends[mine[0]], ends[mine[-1] + 1])
            examples = tuple(picks[i][1] for i in mine)
            shares[members[m].name] = _Share(rows, sum(num_labels[i] for i in mine), examples)
        if anchor_loss is not None:
            anchored = [len(sequence) for sequence in anchor_loss.sequences]
            owned += [range(sum(lengths) + end - n + 1, sum(lengths) + end) for n, end in _with_ends(anchored)]
            sequences, lengths = [*sequences, *anchor_loss.sequences], [*lengths, *anchored]
        device = sequences[0].device
        packing = Packing(lengths, device)
        selected_N = torch.tensor([row for each in owned for row in each], device=device)
        return cls(packing.rows(sequences), packing, selected_N, shares, anchor_loss)

    @property
    def num_labels(self) -> int:
        """Number of labels of all members."""
        return sum(share.num_labels for share in self.shares.values())

    def select_rows(self, output_1ND: Tensor) -> Tensor:
        """Select the rows [N, D] for owners and anchor loss from the suffix's output."""
        return output_1ND[0].index_select(0, self.selected_N)

    def outputs_by_owner(self, found_ND: Tensor, step: int) -> dict[str, BodyOutput]:
        """Return the message to each owner."""
        return {
            name: BodyOutput(
                "train",
                step,
                self.num_labels,
                torch.tensor(share.examples, dtype=torch.int32),
                found_ND[share.rows].detach(),
            )
            for name, share in self.shares.items()
        }

    def merge_gradients(self, found_ND: Tensor, good: Mapping[str, BodyOutputGrad]) -> Tensor:
        """Return the gradient at the selected rows of the mean loss over answered labels plus the anchor loss."""
        grad_ND = torch.zeros_like(found_ND)
        for name, reply in good.items():
            grad_ND[self.shares[name].rows] = reply.grad_ND.to(grad_ND)
        if len(good) < len(self.shares):  # owners divided by the labels of all
            grad_ND *= self.num_labels / sum(self.shares[name].num_labels for name in good)
        if self.anchor_loss is not None:
            first = max(share.rows.stop for share in self.shares.values())
            grad_ND[first:] = self.anchor_loss.compute_gradient(found_ND[first:])
        return grad_ND


def pick_examples(members: Sequence[Member], batch: Sequence[int]) -> list[Picked]:
    """Find the members of a batch's examples, which are numbered over all members; sorted by member."""
    ends = list(accumulate(len(member.inputs) for member in members))
    firsts, owners = [0, *ends], ((bisect_right(ends, number), number) for number in batch)
    return sorted((m, number - firsts[m]) for m, number in owners)


def check_reply(
    reply: Outcome, output: BodyOutput, name: str, where: str, gradient_bounds: bounds.GradientBounds | None = None
) -> Outcome:
    """Return the reply, clipped if necessary, or an error, so that one owner cannot spoil the step of the others.

    Args:
        reply: The owner's reply.
        output: The rows that it was sent.
        name: The owner's name.
        where: Name of the step in errors.
        gradient_bounds: Bounds on its gradient; None where the owner is this site.
    """
    if isinstance(reply, GaisnetError):
        return reply
    if reply.step != output.step or reply.grad_ND.shape != output.rows_ND.shape:
        return WireFormatError(
            f"device '{name}' answers step {output.step} and rows {tuple(output.rows_ND.shape)} "
            f"with step {reply.step} and gradients {tuple(reply.grad_ND.shape)}"
        )
    if not math.isfinite(reply.loss_sum):
        return NotFinite("the training loss", where, reply.loss_sum)
    if not torch.isfinite(reply.grad_ND).all():
        return NotFinite("the gradient of the training loss", where, math.nan)
    if gradient_bounds is None:
        return reply
    try:
        bounds.check_loss(f"device '{name}'", reply.loss_sum, output.num_labels_total)
        return bounds.clip_gradient(name, reply, gradient_bounds.norm_limit(output.rows_ND, output.num_labels_total))
    except OutOfBounds as error:
        return error


def _with_ends(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(lengths, accumulate(lengths), strict=True))
