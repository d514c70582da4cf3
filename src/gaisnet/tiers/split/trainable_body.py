"""The body's half of split learning, for a domain model or the foundation model.

The prefix before the domain adapters is frozen; the suffix with the adapters is trained (GaisNet, arXiv 2401.02668,
section IV; U-shaped, Vepakomma et al., arXiv 1812.00564). Prefix activations are cached, only rows that carry a label
go to their owner, and gradients come back.

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
from gaisnet.tiers.split.activations import Activations, RowSelection, select_tail_rows
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import AnchorLoss, Batch, Member, RequestGradients, check_reply, pick_examples

PREFIX_BATCH = 32


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training."""

    num_examples: int  # of the members that stayed until the end
    num_steps: int
    loss: float  # mean over the label tokens of the last pass
    excluded: Mapping[str, GaisnetError] = field(default_factory=dict)  # errors of members that were excluded


class TrainableBody:
    """A body with adapters, one of which is trained.

    Args:
        body: A body, whose own weights are frozen.
        layout: Assignment of layers to the tiers.
        compute_lock: Held while the body runs or changes, since it may also be served.
        trained_adapter: Name of the adapter to train, which is added later.

    Attributes:
        gradient_bounds: Bounds on the owners' gradients; None where the only owner is this site.
    """

    def __init__(self, body: Body, layout: Layout, compute_lock: ComputeLock, trained_adapter: str) -> None:
        self._body = body
        self._layout = layout
        self._compute_lock = compute_lock
        self._trained_adapter = trained_adapter
        self._causal = not layout.family.is_encoder
        self.gradient_bounds: GradientBounds | None = None
        self._anchor: tuple[Ragged, Ragged] | None = None  # inputs and target outputs of the suffix
        weight = next(body.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        let_attention_be_replaced(body.layers)

    # -- adapters ------------------------------------------------------------------------------------------------------

    def copy_adapter(self, name: str) -> AdapterTensors:
        """Copy an adapter's tensors."""
        with self._compute_lock.learning():
            return take_out(self._body, name)

    def set_adapter(self, name: str, tensors: AdapterTensors) -> None:
        """Overwrite an adapter's tensors. Raises ``AdapterMismatch``."""
        with self._compute_lock.learning():
            put_in(self._body, name, tensors)

    # -- inference -----------------------------------------------------------------------------------------------------

    def run_suffix(self, hidden_BTD: Tensor) -> Tensor:
        """Run the layers with adapters, [B, T, D] -> [B, T, D]."""
        return self._run(hidden_BTD, self._layout.first_adapted)

    def _run(self, hidden_BTD: Tensor, start: int, stop: int | None = None) -> Tensor:
        with self._compute_lock.learning():
            return self._body.run(hidden_BTD, start, stop)

    def run_prefix(self, inputs: Activations) -> Activations:
        """Run the remaining frozen layers after a device's head."""
        first = self._layout.first_adapted
        return inputs.run_layers(lambda h: self._run(h, inputs.next_layer, first), first, PREFIX_BATCH, self._causal)

    def compute_output_rows(self, inputs: Activations) -> Tensor:
        """Return the tail's rows of all examples in order, [N, D] or an encoder's logits [N, C], without gradients."""
        rows_ND = compute_body_output_rows(self.run_suffix, inputs, self._layout.row_selection, self._causal)
        with torch.no_grad(), self._compute_lock.learning():
            return self._body.for_owners(rows_ND)

    # -- training ------------------------------------------------------------------------------------------------------

    def train_adapter(
        self,
        members: Sequence[Member],
        request_gradients: RequestGradients,
        schedule: TrainingSchedule,
        progress: Progress,
    ) -> TrainingResult:
        """Train the adapter by a schedule on the examples of all members together.

        A member that fails is excluded from that step on; once all have failed, the result has no examples.
        """
        settings, excluded = schedule.settings, dict[str, GaisnetError]()
        lengths = [n for member in members for n in member.inputs.hidden.lengths]
        passes = schedule.plan_passes(lengths, len(self._anchor[0].lengths) if self._anchor else 0)
        done, total, loss = 0, sum(map(len, passes)), 0.0
        with self._training() as parameters:
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
                        members,
                        step.examples,
                        step.number,
                        request_gradients,
                        where,
                        excluded,
                        self._anchor_loss(settings, step.anchor_sequences),
                    )
                    excluded |= failed
                    done += 1
                    if not step_tokens:
                        continue
                    with self._compute_lock.learning():
                        clip_grad_norm_(parameters, settings.max_grad_norm)
                        optimizer.step()
                    loss_sum, num_tokens = loss_sum + step_loss, num_tokens + step_tokens
                    progress("fine_tune", done, total, {"loss": step_loss / step_tokens})
                loss = loss_sum / max(num_tokens, 1)
        stayed = sum(len(member.inputs) for member in members if member.name not in excluded)
        return TrainingResult(stayed, done, loss, excluded)

    @contextmanager
    def _training(self) -> Iterator[list[nn.Parameter]]:
        """Make the adapter trainable inside this context and return its parameters."""
        suffix = [layer for name, layer in self._body.layers.items() if int(name) >= self._layout.first_adapted]
        with self._compute_lock.learning():
            parameters = trainable(self._body, self._trained_adapter)
        try:
            with quick_products(*suffix):
                yield parameters
        finally:
            with self._compute_lock.learning():
                self._body.requires_grad_(False)

    def _anchor_loss(self, settings: FineTuneSettings, chosen: Sequence[int]) -> AnchorLoss | None:
        """Return the step's anchor loss, if any. A regularizer need not act in every step (arXiv 1912.04958, B)."""
        if self._anchor is None or not chosen:
            return None
        inputs, targets = (each.sequences() for each in self._anchor)
        targets_ND = torch.cat([targets[i][1:] for i in chosen])
        return AnchorLoss([inputs[i] for i in chosen], targets_ND, settings.anchor_every * settings.anchor_weight)

    def backward_step(
        self,
        members: Sequence[Member],
        indices: Sequence[int],
        step: int,
        request_gradients: RequestGradients,
        where: str,
        without: Collection[str] = (),
        anchor_loss: AnchorLoss | None = None,
    ) -> tuple[float, int, dict[str, GaisnetError]]:
        """Run one split forward and backward pass; gradients accumulate on the trained adapter.

        The compute lock is free while the owners work.

        Args:
            members: Owners of the examples.
            indices: Examples of the batch, counted over all members in order.
            step: Number of the step, echoed by the members.
            request_gradients: Requests gradients from the owners.
            where: Name of the step in errors.
            without: Members whose examples are skipped.
            anchor_loss: An additional loss, which counts only if an owner answers.

        Returns:
            Sum of the losses and number of label tokens of the members that answered, and the errors of the others.
            The gradient is that of the mean loss over these label tokens plus the anchor loss.
        """
        picks = [pick for pick in pick_examples(members, indices) if members[pick[0]].name not in without]
        if not picks:
            return 0.0, 0, {}
        batch = Batch.from_picks(members, picks, anchor_loss, self._layout.row_selection)
        with self._compute_lock.learning():
            found_ND = self._body.for_owners(
                self._body.run(
                    batch.rows_1ND, self._layout.first_adapted, pick=batch.select_rows, packing=batch.packing
                )
            )
        outputs = batch.outputs_by_owner(found_ND, step)
        replies = {
            name: check_reply(reply, outputs[name], name, where, self.gradient_bounds)
            for name, reply in request_gradients(outputs).items()
        }
        answered = {name: reply for name, reply in replies.items() if isinstance(reply, BodyOutputGrad)}
        if answered:
            with self._compute_lock.learning():
                found_ND.backward(batch.merge_gradients(found_ND, answered))
        failed = {name: reply for name, reply in replies.items() if isinstance(reply, GaisnetError)}
        num_labels = sum(batch.shares[name].num_labels for name in answered)
        return sum(reply.loss_sum for reply in answered.values()), num_labels, failed


def compute_body_output_rows(
    suffix: Callable[[Tensor], Tensor], inputs: Activations, selection: RowSelection, causal: bool = True
) -> Tensor:
    """Return the rows [N, D] for the tail of all examples in order, without gradients."""
    outputs = inputs.hidden.map_batches(suffix, PREFIX_BATCH, causal)
    spans = select_tail_rows(outputs.lengths, inputs.num_labels, selection)
    return torch.cat([outputs.rows_ND[rows.start : rows.stop] for rows in spans])
