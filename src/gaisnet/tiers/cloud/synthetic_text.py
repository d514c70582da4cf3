"""Text that the foundation model (FM) wrote: what relays and merged adapters are fitted to, in place of data."""

from collections.abc import Mapping, Sequence

from gaisnet.learning.relay import TaskTemplate
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.split.layout import Layout

Sequences = list[list[int]]


class SyntheticText:
    """Token ids of free text, written once, and of text in each domain's public template, more of it in every cycle.

    Args:
        free: What the FM wrote when nobody asked for anything.
        shapes: What is public about each domain's task, by domain.
        adapters: Which adapter acts while the FM writes for a domain, by domain.
        model: The FM.
        layout: For settings and seeds.
    """

    def __init__(
        self,
        free: Sequence[Sequence[int]],
        shapes: Mapping[str, TaskTemplate],
        adapters: Mapping[str, str],
        model: DecoderParts,
        layout: Layout,
    ) -> None:
        self.free = free
        self.of: dict[str, Sequences] = {domain: [] for domain in shapes}  # of all cycles so far
        self._shapes = shapes
        self._adapters = adapters
        self._model = model
        self._config = layout.config

    def all_of(self, domain: str) -> Sequences:
        """A domain's text; some is written now if there is none."""
        if not self.of[domain]:
            self.write(domain, 0)
        return self.of[domain]

    def write(self, domain: str, cycle: int) -> None:
        """New text, at least a sequence; the FM writes with what it has learned of the domain so far."""
        seed, relay = self._config.seed_for("text", domain, cycle), self._config.relay
        shape, adapter = self._shapes[domain], self._adapters[domain]
        self.of[domain] += self._model.write(shape, max(1, relay.num_shaped), relay, seed, adapter)
