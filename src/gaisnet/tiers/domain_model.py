"""A domain model (DM) as an edge, or a local device, runs it: body, relay and domain adapter, and how it learns.

The frozen prefix ends where the domain adapters start; the suffix from there on learns. Learning is the edge's half
of a split step (GaisNet, arXiv 2401.02668, section IV; U-shaped, Vepakomma et al., arXiv 1812.00564): activations
come out of a cache, only rows that carry a label go to their owner, gradients come back.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec, activate, add_adapter, trainable
from gaisnet.config import FineTuneSettings
from gaisnet.errors import GaisnetError, ModelError
from gaisnet.messages import AdapterRelease, AnchorRelease, BodyOutputGrad, Role
from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.frozen import quick_products
from gaisnet.models.parts import Body
from gaisnet.models.pauses import pause_within
from gaisnet.models.ragged import Ragged, shuffled_batches
from gaisnet.progress import Progress
from gaisnet.tiers.activations import Activations, Wanted, tail_rows
from gaisnet.tiers.layout import Layout
from gaisnet.tiers.split_step import Batch, Labels, Member, Pull, checked, picked
from gaisnet.turn import Turn

PREFIX_BATCH = 32


@dataclass(frozen=True)
class Learned:
    """What came of learning."""

    num_examples: int  # of the members that stayed to the end
    num_steps: int
    loss: float  # mean over the label tokens of the last epoch
    left: Mapping[str, GaisnetError] = field(default_factory=dict)  # members that were left out, and why


class DomainModel:
    """Body with its two adapters.

    Args:
        body: Made by the recipe; it is this model's own from now on.
        layout: Whose layers are whose.
        turn: Held while the body runs or changes, for others may serve it; None where nobody does.
        num_classes: Of the domain, where the body is an encoder's.

    Raises:
        ModelError: The layout is another family's.
    """

    def __init__(self, body: Body, layout: Layout, turn: Turn | None = None, num_classes: int = 0) -> None:
        if body.family is not layout.family:
            raise ModelError(body.config.model_type, "its body is laid out as another family's", "name its own")
        self._body = body.to(layout.config.model.device)
        self._layout = layout
        self._turn = turn or Turn()
        self._causal = not body.family.is_encoder
        self.versions = {"relay": 0, "domain": -1}  # a relay starts as nothing; a domain adapter is given
        self._anchor: tuple[Ragged, Ragged] | None = None
        weight = next(body.parameters())
        self._placement = weight.device, weight.dtype
        spec = layout.domain_spec() if self._causal else layout.class_spec(num_classes)
        self._specs: dict[Role, AdapterSpec] = {"domain": spec}
        if layout.config.relay.enabled and (relay_spec := layout.relay_spec(tuple(body.indices))).layers:
            self._specs["relay"] = relay_spec
        for role, spec in self._specs.items():
            add_adapter(body, role, spec, seed=0)
        activate(body, ("relay", "domain"))
        let_attention_be_replaced(body.layers)
        pause_within(body.layers.values(), self._turn.pause)

    @property
    def body(self) -> Body:
        """To serve it."""
        return self._body

    @property
    def layers(self) -> range:
        """The FM layers that the body stands for."""
        return range(self._layout.first_cut, self._layout.tail_start)

    @property
    def writes(self) -> bool:
        """Whether it writes answers, so that it can be served; an encoder only classifies."""
        return self._causal

    def placement(self) -> tuple[torch.device, torch.dtype]:
        """Where activations must be, and in which dtype, to enter the body."""
        return self._placement

    def take(self, release: AdapterRelease) -> None:
        """Put a released adapter in. Raises ``AdapterMismatch``."""
        self._put(release.role, release.tensors)
        self.versions[release.role] = release.version

    def adapters(self) -> dict[Role, tuple[LoraSpec, AdapterTensors]]:
        """Shape of both adapters, and copies of their tensors as they are now; no relay where it has none.

        They are there to be served, so an encoder, which writes no answers, has none.
        """
        served = {role: spec for role, spec in self._specs.items() if isinstance(spec, LoraSpec) and self._causal}
        return {role: (spec, self._taken_out(role)) for role, spec in served.items()}

    def take_anchor(self, anchor: AnchorRelease) -> None:
        """Keep text that the FM wrote, and what the suffix makes of it without a domain adapter; if it wrote any."""
        if not len(anchor.lengths_E):
            return
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

    @contextmanager
    def guest(self, relay: AdapterTensors, domain: AdapterTensors) -> Iterator[None]:
        """Inside, it is another domain's model: with its adapters; ``relay`` is empty where models have none.

        What is served does not change, nor do versions. Raises ``AdapterMismatch``.
        """
        own = {role: self._taken_out(role) for role in self._specs}
        try:
            self._put("domain", domain)
            if relay:
                self._put("relay", relay)
            yield
        finally:
            for role, tensors in own.items():
                self._put(role, tensors)

    def prefix(self, smashed: Activations) -> Activations:
        """Finish the frozen layers from wherever the device stopped."""
        first = self._layout.first_adapted
        return smashed.through(lambda h: self._run(h, smashed.next_layer, first), first, PREFIX_BATCH, self._causal)

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
        """Rows for the tail of all examples in order, [N, D] or an encoder's logits [N, C], without gradients."""
        rows_ND = body_output_rows(self.suffix, inputs, self._layout.wanted, self._causal)
        with torch.no_grad(), self._turn.learning():
            return self._body.for_owners(rows_ND)

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
            optimizer = torch.optim.AdamW(
                parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
            generator = torch.Generator().manual_seed(seed)
            lengths = [n for member in members for n in member.inputs.hidden.lengths]
            epochs = [
                list(shuffled_batches(lengths, settings.batch_size, generator)) for _ in range(settings.local_epochs)
            ]
            total, step, loss = sum(map(len, epochs)), 0, 0.0
            left: dict[str, GaisnetError] = {}
            for batches in epochs:
                loss_sum, num_tokens = 0.0, 0
                for batch in batches:
                    optimizer.zero_grad()
                    pull = self._pull(settings, generator) if (step + 1) % settings.anchor_every == 0 else None
                    step_loss, step_tokens, failed = self.backward(
                        members, batch, step, labels, f"{where}, step {step}", left, pull
                    )
                    left |= failed
                    step += 1
                    if not step_tokens:
                        continue
                    with self._turn.learning():
                        clip_grad_norm_(parameters, settings.max_grad_norm)
                        optimizer.step()
                    loss_sum, num_tokens = loss_sum + step_loss, num_tokens + step_tokens
                    progress("fine_tune", step, total, {"loss": step_loss / step_tokens})
                loss = loss_sum / max(num_tokens, 1)
        stayed = sum(len(member.inputs) for member in members if member.name not in left)
        return Learned(stayed, step, loss, left)

    @contextmanager
    def _learning_domain(self) -> Iterator[list[nn.Parameter]]:
        """Inside, the domain adapter learns: its parameters."""
        suffix = [layer for name, layer in self._body.layers.items() if int(name) >= self._layout.first_adapted]
        with self._turn.learning():
            parameters = trainable(self._body, "domain")
        with quick_products(*suffix):
            yield parameters
        with self._turn.learning():
            self._body.requires_grad_(False)

    def _pull(self, settings: FineTuneSettings, generator: torch.Generator) -> Pull | None:
        """Some of the text that the FM wrote. Not for every step: a regulariser may rest (arXiv 1912.04958, B)."""
        if self._anchor is None or not settings.anchor_weight:
            return None
        inputs, targets = (each.sequences() for each in self._anchor)
        chosen = torch.randint(len(inputs), (settings.anchor_batch_size,), generator=generator).tolist()
        targets_ND = torch.cat([targets[i][1:] for i in chosen])
        return Pull([inputs[i] for i in chosen], targets_ND, settings.anchor_every * settings.anchor_weight)

    def backward(
        self,
        members: Sequence[Member],
        batch: Sequence[int],
        step: int,
        labels: Labels,
        where: str,
        without: Collection[str] = (),
        pull: Pull | None = None,
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
            pull: Learns along with the examples, if any of their owners answers.

        Returns:
            Sum of the losses and number of label tokens of those that answered, and why others did not. The gradient
            is that of the mean over the label tokens of those that answered, and of the pull's loss.
        """
        picks = [pick for pick in picked(members, batch) if members[pick[0]].name not in without]
        if not picks:
            return 0.0, 0, {}
        taken = Batch.of(members, picks, pull, self._layout.wanted)
        with self._turn.learning():
            found_ND = self._body.for_owners(
                self._body.run(taken.rows_1ND, self._layout.first_adapted, pick=taken.pick, packing=taken.packing)
            )
        outputs = taken.outputs(found_ND, step)
        replies = {name: checked(reply, outputs[name], name, where) for name, reply in labels(outputs).items()}
        good = {name: reply for name, reply in replies.items() if isinstance(reply, BodyOutputGrad)}
        if good:
            with self._turn.learning():
                found_ND.backward(taken.gradient(found_ND, good))
        failed = {name: reply for name, reply in replies.items() if isinstance(reply, GaisnetError)}
        num_labels = sum(taken.shares[name].num_labels for name in good)
        return sum(reply.loss_sum for reply in good.values()), num_labels, failed


def body_output_rows(
    suffix: Callable[[Tensor], Tensor], inputs: Activations, wanted: Wanted, causal: bool = True
) -> Tensor:
    """Rows [N, D] for the tail of all examples of a split, in order, without gradients."""
    outputs = inputs.hidden.map_batches(suffix, PREFIX_BATCH, causal)
    spans = tail_rows(outputs.lengths, inputs.num_labels, wanted)
    return torch.cat([outputs.rows_ND[rows.start : rows.stop] for rows in spans])
