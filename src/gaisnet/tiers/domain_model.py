"""A domain model (DM) as an edge, or a local device, runs it: body, relay and domain adapter, and how it learns.

The frozen prefix ends where the domain adapters start; the suffix from there on learns. Learning is the edge's half
of a split step (GaisNet, arXiv 2401.02668, section IV; U-shaped, Vepakomma et al., arXiv 1812.00564): activations
come out of a cache, only rows that carry a label go to their owner, gradients come back.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter, trainable
from gaisnet.config import FineTuneSettings
from gaisnet.errors import GaisnetError, NotFinite, WireFormatError
from gaisnet.messages import AdapterRelease, AnchorRelease, BodyOutput, BodyOutputGrad, Role
from gaisnet.models.frozen import quick_products
from gaisnet.models.parts import Body
from gaisnet.models.pauses import pause_within
from gaisnet.models.ragged import Ragged, length_mask, relative_square, shuffled_batches
from gaisnet.progress import Progress
from gaisnet.tiers.activations import Activations, rows_for_tail, rows_per_example
from gaisnet.tiers.layout import Layout
from gaisnet.turn import Turn

PREFIX_BATCH = 32

Outcome = BodyOutputGrad | GaisnetError
Labels = Callable[[Mapping[str, BodyOutput]], Mapping[str, Outcome]]
"""Asks all owners of a step's labels at once, by name; for one that fails, the error comes instead of a gradient."""


@dataclass(frozen=True)
class Member:
    """One device's share of a cohort: its examples at the suffix's input."""

    name: str
    inputs: Activations


@dataclass(frozen=True)
class Learned:
    """What came of learning."""

    num_examples: int  # of the members that stayed to the end
    num_steps: int
    loss: float  # mean over the label tokens of the last epoch
    left: Mapping[str, GaisnetError] = field(default_factory=dict)  # members that were left out, and why


@dataclass(frozen=True)
class _Step:
    """A batch, forward: what goes to each owner, and where its gradient belongs."""

    rows_ND: Tensor
    outputs: dict[str, BodyOutput]
    rows: dict[str, slice]
    num_labels: dict[str, int]


class DomainModel:
    """Body with its two adapters.

    Args:
        body: Made by the recipe; it is this model's own from now on.
        layout: Whose layers are whose.
        turn: Held while the body runs or changes, for others may serve it; None where nobody does.
    """

    def __init__(self, body: Body, layout: Layout, turn: Turn | None = None) -> None:
        self._body = body.to(layout.config.model.device)
        self._layout = layout
        self._turn = turn or Turn()
        self._whole = layout.config.tail_layers > 0
        self.versions = {"relay": 0, "domain": -1}  # a relay starts as nothing; a domain adapter is given
        self._anchor: tuple[Ragged, Ragged] | None = None
        weight = next(body.parameters())
        self._placement = weight.device, weight.dtype
        self._specs: dict[Role, LoraSpec] = {"domain": layout.domain_spec()}
        relay_spec = layout.relay_spec(tuple(body.indices))
        if layout.config.relay.enabled and relay_spec.layers:
            self._specs["relay"] = relay_spec
        for role, spec in self._specs.items():
            add_adapter(body, role, spec, seed=0)
        activate(body, ("relay", "domain"))
        pause_within(body.layers.values(), self._turn.pause)

    @property
    def body(self) -> Body:
        """To serve it."""
        return self._body

    @property
    def layers(self) -> range:
        """The FM layers that the body stands for."""
        return range(self._layout.first_cut, self._layout.tail_start)

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Where activations must be, and in which dtype, to enter the body."""
        return self._placement

    def take(self, release: AdapterRelease) -> None:
        """Put a released adapter in. Raises ``AdapterMismatch``."""
        self._put(release.role, release.tensors)
        self.versions[release.role] = release.version

    def adapters(self) -> dict[Role, tuple[LoraSpec, AdapterTensors]]:
        """Shape of both adapters, and copies of their tensors as they are now; no relay where it has none."""
        return {role: (spec, self._taken_out(role)) for role, spec in self._specs.items()}

    def take_anchor(self, anchor: AnchorRelease) -> None:
        """Keep text that the FM wrote, and what the suffix makes of it without a domain adapter."""
        rows_ND = anchor.hidden_ND.to(*self.placement())
        inputs = Ragged(rows_ND, tuple(anchor.lengths_E.tolist()))
        with self._turn.learning():
            activate(self._body, ("relay",))
            self._anchor = inputs, inputs.map_batches(self.suffix, PREFIX_BATCH)
            activate(self._body, ("relay", "domain"))

    def domain_adapter(self) -> AdapterTensors:
        """Copies of the domain adapter's tensors."""
        return self._taken_out("domain")

    def put_domain_adapter(self, tensors: AdapterTensors) -> None:
        """Overwrite the domain adapter."""
        self._put("domain", tensors)

    def prefix(self, smashed: Activations) -> Activations:
        """Finish the frozen layers from wherever the device stopped."""
        first = self._layout.first_adapted
        return smashed.through(lambda h: self._run(h, smashed.next_layer, first), first, PREFIX_BATCH)

    def suffix(self, hidden_BTD: Tensor) -> Tensor:
        """The layers that learn, [B, T, D] -> [B, T, D]."""
        return self._run(hidden_BTD, self._layout.first_adapted)

    def _run(self, hidden_BTD: Tensor, start: int, stop: int | None = None) -> Tensor:
        with self._turn.learning():
            return self._body.run(hidden_BTD, start, stop)

    def _put(self, role: Role, tensors: AdapterTensors) -> None:
        with self._turn.learning():
            put_in(self._body, role, tensors)

    def _taken_out(self, role: Role) -> AdapterTensors:
        with self._turn.learning():
            return take_out(self._body, role)

    def output_rows(self, inputs: Activations) -> Tensor:
        """Rows for the tail of all examples in order, without gradients."""
        return body_output_rows(self.suffix, inputs, self._whole)

    def learn(
        self,
        members: Sequence[Member],
        labels: Labels,
        settings: FineTuneSettings,
        seed: int,
        where: str,
        progress: Progress,
    ) -> Learned:
        """Train the domain adapter for ``settings.local_epochs`` on all members together.

        A member that fails is left out from that step on; when none is left the learning ends, and has no examples.
        ``where`` and the step are named where a member's loss is not finite.
        """
        with self._learning_domain() as parameters:
            return self._learned(parameters, members, labels, settings, seed, where, progress)

    @contextmanager
    def _learning_domain(self) -> Iterator[list[nn.Parameter]]:
        """Inside, the domain adapter learns: its parameters."""
        suffix = [layer for name, layer in self._body.layers.items() if int(name) >= self._layout.first_adapted]
        with quick_products(*suffix):
            with self._turn.learning():
                parameters = trainable(self._body, "domain")
            yield parameters
            with self._turn.learning():
                self._body.requires_grad_(False)

    def _learned(
        self,
        parameters: list[nn.Parameter],
        members: Sequence[Member],
        labels: Labels,
        settings: FineTuneSettings,
        seed: int,
        where: str,
        progress: Progress,
    ) -> Learned:
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        generator = torch.Generator().manual_seed(seed)
        lengths = [n for member in members for n in member.inputs.hidden.lengths]
        epochs = [list(shuffled_batches(lengths, settings.batch_size, generator)) for _ in range(settings.local_epochs)]
        total, step, loss = sum(map(len, epochs)), 0, 0.0
        left: dict[str, GaisnetError] = {}
        for batches in epochs:
            loss_sum, num_tokens = 0.0, 0
            for batch in batches:
                optimizer.zero_grad()
                step_loss, step_tokens, failed = self.backward(
                    members, batch, step, labels, f"{where}, step {step}", left
                )
                left |= failed
                step += 1
                if not step_tokens:
                    continue
                with self._turn.learning():
                    if step % settings.anchor_every == 0:
                        self._backward_anchor(settings, generator)
                    clip_grad_norm_(parameters, settings.max_grad_norm)
                    optimizer.step()
                loss_sum, num_tokens = loss_sum + step_loss, num_tokens + step_tokens
                progress("fine_tune", step, total, {"loss": step_loss / step_tokens})
            loss = loss_sum / max(num_tokens, 1)
        stayed = sum(len(member.inputs) for member in members if member.name not in left)
        return Learned(stayed, step, loss, left)

    def _backward_anchor(self, settings: FineTuneSettings, generator: torch.Generator) -> None:
        """Add the gradient of the pull toward the FM's own output (learning without forgetting, arXiv 1606.09282).

        Not in every step, as a regulariser may be (Karras et al., arXiv 1912.04958, appendix B).
        """
        if self._anchor is None or not settings.anchor_weight:
            return
        inputs, targets = self._anchor
        batch = torch.randint(len(inputs), (settings.anchor_batch_size,), generator=generator).tolist()
        mask_BT = length_mask([inputs.lengths[i] for i in batch], inputs.rows_ND.device)
        found_BTD = self.suffix(inputs.padded(batch))
        loss = relative_square(found_BTD, targets.padded(batch), mask_BT)
        (settings.anchor_every * settings.anchor_weight * loss).backward()

    def backward(
        self,
        members: Sequence[Member],
        batch: Sequence[int],
        step: int,
        labels: Labels,
        where: str,
        without: Collection[str] = (),
    ) -> tuple[float, int, dict[str, GaisnetError]]:
        """One split forward and backward; gradients are left on the domain adapter.

        While the owners are asked, others may run the body.

        Args:
            members: Owners of the examples.
            batch: Places in all members' examples, one member after the other.
            step: Number of the step, echoed by the members.
            labels: Asks the owners for gradients.
            where: Names the step in errors.
            without: Members whose examples are passed over.

        Returns:
            Sum of the losses and number of label tokens of those that answered, and why others did not. The gradient
            is that of the mean over the label tokens of those that answered.
        """
        picks = [pick for pick in _places(members, batch) if members[pick[0]].name not in without]
        if not picks:
            return 0.0, 0, {}
        forward = self._forward(members, picks, step)
        replies = {
            name: _checked(reply, forward.outputs[name], name, where) for name, reply in labels(forward.outputs).items()
        }
        good = {name: reply for name, reply in replies.items() if isinstance(reply, BodyOutputGrad)}
        num_labels = sum(forward.num_labels[name] for name in good)
        if good:
            grad_ND = torch.zeros_like(forward.rows_ND)
            for name, reply in good.items():
                grad_ND[forward.rows[name]] = reply.grad_ND.to(grad_ND)
            if len(good) < len(replies):  # owners divided by the labels of all
                grad_ND *= sum(forward.num_labels.values()) / num_labels
            with self._turn.learning():
                forward.rows_ND.backward(grad_ND)
        failed = {name: reply for name, reply in replies.items() if isinstance(reply, GaisnetError)}
        return sum(reply.loss_sum for reply in good.values()), num_labels, failed

    def _forward(self, members: Sequence[Member], picks: Sequence[tuple[int, int]], step: int) -> _Step:
        """Run the suffix over a batch; ``picks`` are (member, example), a member's together."""
        lengths = [members[m].inputs.hidden.lengths[e] for m, e in picks]
        num_labels = [members[m].inputs.num_labels[e] for m, e in picks]
        hidden = [member.inputs.hidden.sequences() for member in members]
        hidden_BTD = pad_sequence([hidden[m][e] for m, e in picks], batch_first=True)
        with self._turn.learning():
            rows_ND = self._body.run(
                hidden_BTD,
                self._layout.first_adapted,
                pick=lambda output_BTD: rows_for_tail(output_BTD, lengths, num_labels, self._whole),
            )
        counts = rows_per_example(lengths, num_labels, self._whole)
        forward, first = _Step(rows_ND, {}, {}, {}), 0
        for m in sorted({m for m, _ in picks}):
            name, mine = members[m].name, [i for i, (owner, _) in enumerate(picks) if owner == m]
            rows = slice(first, first + sum(counts[i] for i in mine))
            examples_E = _int32([picks[i][1] for i in mine])
            output = BodyOutput("train", step, sum(num_labels), examples_E, rows_ND[rows].detach())
            forward.outputs[name], forward.rows[name] = output, rows
            forward.num_labels[name] = sum(num_labels[i] for i in mine)
            first = rows.stop
        return forward


def _checked(reply: Outcome, output: BodyOutput, name: str, where: str) -> Outcome:
    """The reply, or what is wrong with it: one owner's rows must not spoil the step of the others."""
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
    return reply


def body_output_rows(suffix: Callable[[Tensor], Tensor], inputs: Activations, whole: bool) -> Tensor:
    """Rows [N, D] for the tail of all examples of a split, in order, without gradients."""
    outputs = inputs.hidden.map_batches(suffix, PREFIX_BATCH)
    firsts = [0] * len(inputs) if whole else [n - k for n, k in zip(outputs.lengths, inputs.num_labels, strict=True)]
    return torch.cat([rows[first:] for rows, first in zip(outputs.sequences(), firsts, strict=True)])


def _places(members: Sequence[Member], batch: Sequence[int]) -> list[tuple[int, int]]:
    """(member, example) of each place, sorted so that a member's rows lie together."""
    ends = list(accumulate(len(member.inputs) for member in members))
    firsts, owners = [0, *ends], ((bisect_right(ends, place), place) for place in batch)
    return sorted((m, place - firsts[m]) for m, place in owners)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
