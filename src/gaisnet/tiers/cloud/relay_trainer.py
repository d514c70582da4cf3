"""The down flow's teacher: a relay per domain model (DM) learns on text that the foundation model (FM) wrote."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import activate, add_adapter
from gaisnet.learning.relay import RELAY, Distillation, Lesson, leaving, relative_error, repair
from gaisnet.models.parts import Body
from gaisnet.models.ragged import token_rows
from gaisnet.models.recipe import Recipe
from gaisnet.progress import Progress
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.cloud.synthetic_text import SyntheticText
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.trainable_body import PREFIX_BATCH


class RelayTrainer:
    """Holds the cloud's copy of the DM's body, and the relay of every domain.

    Args:
        model: The FM.
        domain_body: What every edge's DM is made of.
        layout: Whose layers are whose.
        recipe: The layers that the DM keeps.
        texts: What the FM wrote.
        progress: Told while a relay learns.
    """

    def __init__(
        self,
        model: DecoderParts,
        domain_body: Body,
        layout: Layout,
        recipe: Recipe,
        texts: SyntheticText,
        progress: Progress,
    ) -> None:
        self.relays: dict[str, AdapterTensors] = {}  # by domain; empty where the recipe left nothing to repair
        self._model = model
        self._body = domain_body
        self._layout = layout
        self._config = layout.config
        self._text = texts
        self._progress = progress
        self._spec = layout.relay_spec(recipe.kept)
        if self._config.relay.enabled and self._spec.layers:
            add_adapter(domain_body, RELAY, self._spec, self._config.seed_for("relay adapter"))
            activate(domain_body, (RELAY,))
            self.relays = {domain: take_out(domain_body, RELAY) for domain in texts.of}

    def teach(self, domain: str, adapter: str) -> Distillation | None:
        """Fit the DM's middle to the FM's on all text of the domain and free text; None where there is no relay.

        A relay is kept where it helps. ``adapter`` is the domain's, with which both speak.
        """
        if domain not in self.relays:
            return None
        learned, held_out = self._free.and_also(self._seen(self._text.of[domain])).halves()
        put_in(self._body, RELAY, self.relays[domain])
        error_before, kl_before = self._apart(held_out, adapter)
        relay = repair(self._body, self._spec, learned, self._config.relay.penalty, self._progress)
        error_after, kl_after = self._apart(held_out, adapter)
        result = Distillation(error_before, error_after, kl_before, kl_after)
        if result.helped:
            self.relays[domain] = relay
        return result

    def _apart(self, text: Lesson, adapter: str) -> tuple[float, float]:
        """How far the DM is from the FM, in hidden states and in what it says."""
        found, target = leaving(self._body, text), text.states[text.middle[1]]
        return relative_error(found, text), self._model.divergence(target, found, adapter)

    @cached_property
    def _free(self) -> Lesson:
        """Text that was written when nobody asked for anything: the same for all domains and cycles."""
        return self._seen(self._text.free[: self._config.relay.num_free])

    def _seen(self, sequences: Sequence[Sequence[int]]) -> Lesson:
        """What the FM alone sees in a text, where the relay needs it."""
        text, middle = token_rows(sequences, self._model.device), self._layout.middle
        states = {middle.start: text.map_batches(lambda ids_BT1: self._model.at_middle(ids_BT1[..., 0]), PREFIX_BATCH)}
        kept = [index for index in self._body.indices if index in middle]
        behind = dict(pairwise([*kept, middle.stop]))
        for start, stop in pairwise(sorted({middle.start, *(behind[i] for i in self._spec.layers), middle.stop})):
            states[stop] = self._model.between(states[start], start, stop)
        return Lesson(states)
