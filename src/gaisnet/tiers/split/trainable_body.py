"""A body whose late layers learn, of a domain model or of the foundation model: the half of a split step that has it.

The frozen prefix ends where domain adapters start; the suffix from there on learns (GaisNet, arXiv 2401.02668, section
IV; U-shaped, Vepakomma et al., arXiv 1812.00564): activations come out of a cache, only rows that carry a label go to
their owner, gradients come back.

Shape legend: B sequences, T positions, N rows (positions picked out of several sequences), D hidden size, C classes.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import trainable
from gaisnet.compute_lock import ComputeLock
from gaisnet.config.learning import FineTuneSettings
from gaisnet.errors import GaisnetError
from gaisnet.messages import BodyOutputGrad
from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.frozen import quick_products
from gaisnet.models.parts import Body
from gaisnet.models.ragged import Ragged
from gaisnet.progress import Progress
from gaisnet.tiers.split.activations import Activations, RowSelection, tail_rows
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Batch, Member, Pull, RequestGradients, check_reply, pick_examples

PREFIX_BATCH = 32


@dataclass(frozen=True)
class TrainingResult:
    """What came of learning."""

    num_examples: int  # of the members that stayed to the end
    num_steps: int
    loss: float  # mean over the label tokens of the last epoch
    left: Mapping[str, GaisnetError] = field(default_factory=dict)  # members that were left out, and why


class TrainableBody:
    """A body on which adapters sit; one of them learns.

    Args:
        body: Its weights stay as they are.
        layout: Whose layers are whose.
        compute_lock: Held while the body runs or changes, for others may serve it.
        learns: Name of the adapter that learns. It is put on later.

    Attributes:
        gradient_bounds: Bounds the gradients that owners send; None where the only owner is at this site.
    """

    def __init__(self, body: Body, layout: Layout, compute_lock: ComputeLock, learns: str) -> None:
        self._body = body
        self._layout = layout
        self._compute_lock = compute_lock
        self._learns = learns
        self._causal = not layout.family.is_encoder
        self.gradient_bounds: GradientBounds | None = None
        self._anchor: tuple[Ragged, Ragged] | None = None  # what enters the suffix, and what it should make of it
        weight = next(body.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        let_attention_be_replaced(body.layers)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def copy_adapter(self, name: str) -> AdapterTensors:
        """Copies of an adapter's tensors."""
        with self._compute_lock.learning():
            return take_out(self._body, name)

    def set_adapter(self, name: str, tensors: AdapterTensors) -> None:
        """Overwrite an adapter. Raises ``AdapterMismatch``."""
        with self._compute_lock.learning():
            put_in(self._body, name, tensors)

    # -- running it ----------------------------------------------------------------------------------------------------

    def run_suffix(self, hidden_BTD: Tensor) -> Tensor:
        """The layers that learn, [B, T, D] -> [B, T, D]."""
        return self._run(hidden_BTD, self._layout.first_adapted)

    def _run(self, hidden_BTD: Tensor, start: int, stop: int | None = None) -> Tensor:
        with self._compute_lock.learning():
            return self._body.run(hidden_BTD, start, stop)

    def run_prefix(self, inputs: Activations) -> Activations:
        """Finish the frozen layers from wherever the device stopped."""
        first = self._layout.first_adapted
        return inputs.run_layers(lambda h: self._run(h, inputs.next_layer, first), first, PREFIX_BATCH, self._causal)

    def compute_output_rows(self, inputs: Activations) -> Tensor:
        """Rows for the tail of all examples in order, [N, D] or an encoder's logits [N, C], without gradients."""
        rows_ND = body_output_rows(self.run_suffix, inputs, self._layout.row_selection, self._causal)
        with torch.no_grad(), self._compute_lock.learning():
            return self._body.for_owners(rows_ND)

    # -- learning ------------------------------------------------------------------------------------------------------

    def train_adapter(
        self, members: Sequence[Member], labels: RequestGradients, schedule: TrainingSchedule, progress: Progress
    ) -> TrainingResult:
        """Train the adapter that learns, for a stint, on all members together.

        A member that fails is left out from that step on; when none is left the learning ends, and has no examples.
        """
        settings, left = schedule.settings, dict[str, GaisnetError]()
        lengths = [n for member in members for n in member.inputs.hidden.lengths]
        passes = schedule.plan_passes(lengths, len(self._anchor[0].lengths) if self._anchor else 0)
        done, total, loss = 0, sum(map(len, passes)), 0.0
        with self._learning() as parameters:
            optimizer = torch.optim.AdamW(
                parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
            for steps in passes:
                loss_sum, num_tokens = 0.0, 0
                for step in steps:
                    optimizer.zero_grad()
                    for group in optimizer.param_groups:
                        group["lr"] = step.learning_rate
                    where = f"{schedule.where}, step {step.number}"
                    step_loss, step_tokens, failed = self.backward_step(
                        members, step.examples, step.number, labels, where, left, self._pull(settings, step.pulled)
                    )
                    left |= failed
                    done += 1
                    if not step_tokens:
                        continue
                    with self._compute_lock.learning():
                        clip_grad_norm_(parameters, settings.max_grad_norm)
                        optimizer.step()
                    loss_sum, num_tokens = loss_sum + step_loss, num_tokens + step_tokens
                    progress("fine_tune", done, total, {"loss": step_loss / step_tokens})
                loss = loss_sum / max(num_tokens, 1)
        stayed = sum(len(member.inputs) for member in members if member.name not in left)
        return TrainingResult(stayed, done, loss, left)

    @contextmanager
    def _learning(self) -> Iterator[list[nn.Parameter]]:
        """Inside, the adapter learns: its parameters."""
        suffix = [layer for name, layer in self._body.layers.items() if int(name) >= self._layout.first_adapted]
        with self._compute_lock.learning():
            parameters = trainable(self._body, self._learns)
        try:
            with quick_products(*suffix):
                yield parameters
        finally:
            with self._compute_lock.learning():
                self._body.requires_grad_(False)

    def _pull(self, settings: FineTuneSettings, chosen: Sequence[int]) -> Pull | None:
        """Some of the text that the FM wrote. Not for every step: a regulariser may rest (arXiv 1912.04958, B)."""
        if self._anchor is None or not chosen:
            return None
        inputs, targets = (each.sequences() for each in self._anchor)
        targets_ND = torch.cat([targets[i][1:] for i in chosen])
        return Pull([inputs[i] for i in chosen], targets_ND, settings.anchor_every * settings.anchor_weight)

    def backward_step(
        self,
        members: Sequence[Member],
        batch: Sequence[int],
        step: int,
        labels: RequestGradients,
        where: str,
        without: Collection[str] = (),
        pull: Pull | None = None,
    ) -> tuple[float, int, dict[str, GaisnetError]]:
        """One split forward and backward; gradients are left on the adapter that learns.

        While the owners are asked, others may run the body.

        Args:
            members: Owners of the examples.
            batch: Places in all members' examples, one member after the other.
            step: Number of the step, echoed by the members.
            labels: Asks the owners for gradients.
            where: Names the step in errors.
            without: Members whose examples are passed over.
            pull: Learns along with the examples, if any of their owners answers.

        Returns:
            Sum of the losses and number of label tokens of those that answered, and why others did not. The gradient
            is that of the mean over the label tokens of those that answered, and of the pull's loss.
        """
        picks = [pick for pick in pick_examples(members, batch) if members[pick[0]].name not in without]
        if not picks:
            return 0.0, 0, {}
        taken = Batch.from_picks(members, picks, pull, self._layout.row_selection)
        with self._compute_lock.learning():
            found_ND = self._body.for_owners(
                self._body.run(
                    taken.rows_1ND, self._layout.first_adapted, pick=taken.select_rows, packing=taken.packing
                )
            )
        outputs = taken.outputs_by_owner(found_ND, step)
        replies = {
            name: check_reply(reply, outputs[name], name, where, self.gradient_bounds)
            for name, reply in labels(outputs).items()
        }
        good = {name: reply for name, reply in replies.items() if isinstance(reply, BodyOutputGrad)}
        if good:
            with self._compute_lock.learning():
                found_ND.backward(taken.merge_gradients(found_ND, good))
        failed = {name: reply for name, reply in replies.items() if isinstance(reply, GaisnetError)}
        num_labels = sum(taken.shares[name].num_labels for name in good)
        return sum(reply.loss_sum for reply in good.values()), num_labels, failed


def body_output_rows(
    suffix: Callable[[Tensor], Tensor], inputs: Activations, wanted: RowSelection, causal: bool = True
) -> Tensor:
    """Rows [N, D] for the tail of all examples of a split, in order, without gradients."""
    outputs = inputs.hidden.map_batches(suffix, PREFIX_BATCH, causal)
    spans = tail_rows(outputs.lengths, inputs.num_labels, wanted)
    return torch.cat([outputs.rows_ND[rows.start : rows.stop] for rows in spans])
