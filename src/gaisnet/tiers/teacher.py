"""The down flow's teacher: the foundation model (FM) writes text, and a relay per domain model (DM) learns on it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise

import torch

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import activate, add_adapter
from gaisnet.models.domain import Recipe
from gaisnet.models.parts import Body
from gaisnet.models.ragged import Ragged
from gaisnet.progress import Progress
from gaisnet.relay.downward import RELAY, Distillation, Lesson, TaskShape, relative_error, repair
from gaisnet.tiers.domain_model import PREFIX_BATCH
from gaisnet.tiers.foundation_model import FoundationModel
from gaisnet.tiers.layout import Layout


class Teacher:
    """Holds the cloud's copy of the DM's body, and the relay of every domain.

    Args:
        model: The FM.
        domain_body: What every edge's DM is made of.
        layout: Whose layers are whose.
        recipe: The layers that the DM keeps.
        shapes: What is public about each domain's task, by domain.
        free_text: Token ids of text that the FM wrote when nobody asked for anything.
        progress: Told while a relay learns.
    """

    def __init__(
        self,
        model: FoundationModel,
        domain_body: Body,
        layout: Layout,
        recipe: Recipe,
        shapes: Mapping[str, TaskShape],
        free_text: Sequence[Sequence[int]],
        progress: Progress,
    ) -> None:
        self.relays: dict[str, AdapterTensors] = {}  # by domain; empty where the recipe left nothing to repair
        self.texts: dict[str, list[list[int]]] = {domain: [] for domain in shapes}  # token ids, of all cycles so far
        self._model = model
        self._body = domain_body
        self._layout = layout
        self._config = layout.config
        self._shapes = shapes
        self._free_text = free_text
        self._progress = progress
        self._spec = layout.relay_spec(recipe.kept)
        if self._config.relay.enabled and self._spec.layers:
            add_adapter(domain_body, RELAY, self._spec, self._config.seed_for("relay adapter"))
            activate(domain_body, (RELAY,))
            self.relays = {domain: take_out(domain_body, RELAY) for domain in shapes}

    def teach(self, domain: str, cycle: int) -> Distillation | None:
        """Fit the DM's middle to the FM's on text, more of it in every cycle; None where there is no relay.

        A relay is kept where it helps.
        """
        if domain not in self.relays:
            return None
        self.texts[domain] += self._written(domain, cycle)
        learned, held_out = self._free.and_also(self._seen(self.texts[domain])).halves()
        put_in(self._body, RELAY, self.relays[domain])
        before = relative_error(self._body, held_out)
        relay = repair(self._body, self._spec, learned, self._config.relay.penalty, self._progress)
        result = Distillation(before, relative_error(self._body, held_out))
        if result.helped:
            self.relays[domain] = relay
        return result

    @cached_property
    def _free(self) -> Lesson:
        """Text that was written when nobody asked for anything: the same for all domains and cycles."""
        return self._seen(self._free_text[: self._config.relay.num_free])

    def _written(self, domain: str, cycle: int) -> list[list[int]]:
        """New text, at least a sequence; the FM writes with what it has learned of the domain so far."""
        seed, relay = self._config.seed_for("text", domain, cycle), self._config.relay
        return self._model.write(self._shapes[domain], max(1, relay.num_shaped), relay, seed, domain)

    def _seen(self, sequences: Sequence[Sequence[int]]) -> Lesson:
        """What the FM alone sees in a text, where the relay needs it."""
        ids_N1 = torch.tensor([i for ids in sequences for i in ids], device=self._model.device)[:, None]
        text, middle = Ragged(ids_N1, tuple(map(len, sequences))), self._layout.middle
        states = {middle.start: text.map_batches(lambda ids_BT1: self._model.at_middle(ids_BT1[..., 0]), PREFIX_BATCH)}
        kept = [index for index in self._body.indices if index in middle]
        behind = dict(pairwise([*kept, middle.stop]))
        for start, stop in pairwise(sorted({middle.start, *(behind[i] for i in self._spec.layers), middle.stop})):
            states[stop] = self._model.between(states[start], start, stop)
        return Lesson(states)
