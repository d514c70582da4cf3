"""Fits a relay for each domain model (DM) to text that the foundation model (FM) generated."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import activate, add_adapter
from gaisnet.learning.relay import RELAY, Distillation, TextStates, fit_relay, relative_error, run_middle
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
        parts: The FM.
        domain_body: The body of every edge's DM.
        layout: Layers of each party.
        recipe: The layers that the DM keeps.
        text: Text that the FM generated.
        progress: Told while a relay is fitted.

    Attributes:
        relays: Relays by domain; empty if the recipe leaves nothing to repair.
    """

    def __init__(
        self,
        parts: DecoderParts,
        domain_body: Body,
        layout: Layout,
        recipe: Recipe,
        text: SyntheticText,
        progress: Progress,
    ) -> None:
        self.relays: dict[str, AdapterTensors] = {}
        self._parts = parts
        self._body = domain_body
        self._layout = layout
        self._config = config = layout.config
        self._text = text
        self._progress = progress
        self._adapter_of = {edge.domain: edge.adapter for edge in config.edges}
        training = [edge.domain for edge in config.learning_edges()]
        merges = len(training) > 1 and "regression" in config.absorb.merge.ways
        self._merged_on_text = frozenset(training if merges else ())
        self._spec = layout.relay_spec(recipe.kept)
        if config.relay.enabled and self._spec.layers:
            add_adapter(domain_body, RELAY, self._spec, config.seed_for("relay adapter"))
            activate(domain_body, (RELAY,))
            self.relays = {domain: take_out(domain_body, RELAY) for domain in text.by_domain}

    def train_relay(self, domain: str, cycle: int) -> Distillation | None:
        """Generate text for a domain and fit the DM's middle to the FM's on it; None if there is no relay.

        The relay is kept if it helps on text that it was not fitted to; otherwise the previous one stays. Text is also
        generated for domains whose adapters are merged by regression.
        """
        if domain in self.relays or domain in self._merged_on_text:
            self._text.generate_more(domain, cycle)
        if domain not in self.relays:
            return None
        adapter = self._adapter_of[domain]
        fitted, test = self._free.concatenate(self._seen(self._text.by_domain[domain])).split()
        put_in(self._body, RELAY, self.relays[domain])
        error_before, kl_before = self._apart(test, adapter)
        relay = fit_relay(self._body, self._spec, fitted, self._config.relay.penalty, self._progress)
        error_after, kl_after = self._apart(test, adapter)
        result = Distillation(error_before, error_after, kl_before, kl_after)
        if result.helped:
            self.relays[domain] = relay
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for ``load_state_dict``; relays are saved by the caller."""
        return {"texts": self._text.by_domain}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of ``state``."""
        self._text.by_domain = state["texts"]

    def _apart(self, text: TextStates, adapter: str) -> tuple[float, float]:
        """Return the distance between DM and FM in hidden states, and in next-token distributions."""
        found, target = run_middle(self._body, text), text.states[text.middle[1]]
        return relative_error(found, text), self._parts.divergence(target, found, adapter)

    @cached_property
    def _free(self) -> TextStates:
        """Unconditional text, the same for all domains and cycles."""
        return self._seen(self._text.free[: self._config.relay.num_free])

    def _seen(self, sequences: Sequence[Sequence[int]]) -> TextStates:
        """Compute the FM's own hidden states on a text, where the relay needs them."""
        text, middle = token_rows(sequences, self._parts.device), self._layout.middle
        states = {middle.start: text.map_batches(lambda ids_BT1: self._parts.at_middle(ids_BT1[..., 0]), PREFIX_BATCH)}
        kept = [index for index in self._body.indices if index in middle]
        behind = dict(pairwise([*kept, middle.stop]))
        for start, stop in pairwise(sorted({middle.start, *(behind[i] for i in self._spec.layers), middle.stop})):
            states[stop] = self._parts.between(states[start], start, stop)
        return TextStates(states)
