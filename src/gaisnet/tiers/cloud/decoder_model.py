"""Assembles the cloud's model from a decoder: it generates text for relays, and a gate watches perplexity."""

from collections.abc import Mapping
from typing import Any

import torch

from gaisnet.adapters.arithmetic import side_by_side, weakened
from gaisnet.adapters.state import AdapterTensors
from gaisnet.config.learning import AbsorbSettings
from gaisnet.learning.gate import Verdict, strongest_accepted, verdict_on_perplexity
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import AnchorRelease
from gaisnet.models.foundation import Foundation
from gaisnet.models.preemption import pause_within
from gaisnet.progress import Progress
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.cloud.merger import Merger
from gaisnet.tiers.cloud.model import CloudModel, Sizes
from gaisnet.tiers.cloud.relay_trainer import RelayTrainer
from gaisnet.tiers.cloud.synthetic_text import SyntheticText
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.publisher import Publisher


def build_decoder_model(
    foundation: Foundation,
    layout: Layout,
    templates: Mapping[str, TaskTemplate],
    retention_text: str,
    progress: Progress,
    publisher: Publisher,
) -> CloudModel:
    """Generate the anchor's text, fill in the recipe, and put adapters beside the FM's late layers.

    Args:
        foundation: The FM; its weights do not change.
        layout: Layers of each party.
        templates: Public description of each domain's task, by domain.
        retention_text: Public text that no domain trains on, to measure general ability.
        progress: Told while text is generated and relays are fitted.
        publisher: Serves the body.

    Raises:
        DataError: Too little public text.
    """
    config, absorb = layout.config, layout.config.absorb
    parts = DecoderParts(foundation, layout, publisher.compute_lock)
    retention_ids_BT = parts.windows(retention_text, absorb.retention_windows, absorb.retention_tokens)
    free_text_BT = parts.free_text()
    recipe, domain_body = parts.make_domain_body(free_text_BT)
    # All of these are taken before adapters stand between the layers and their weights.
    model_release = parts.build_release(recipe, domain_body)
    free_text = free_text_BT.tolist()
    hidden = parts.at_suffix(free_text[: config.fine_tune.anchor_sequences])
    anchor_release = AnchorRelease(torch.tensor(hidden.lengths, dtype=torch.int32), hidden.rows_ND)
    foundation_params, split_device_params = parts.num_parameters()
    sizes = Sizes(foundation_params, layout.num_layers, len(recipe.kept), split_device_params)
    pause_within({*parts.body.layers.values(), *domain_body.layers.values()}, publisher.compute_lock.pause)
    domains = tuple(edge.domain for edge in config.learning_edges())
    text = SyntheticText(free_text, templates, {edge.domain: edge.adapter for edge in config.edges}, parts, layout)
    relay_trainer = RelayTrainer(parts, domain_body, layout, recipe, text, progress)
    specs = {name: layout.domain_spec(len(domains) if name == MERGED else 1) for name in (*domains, MERGED)}
    for name, spec in specs.items():
        parts.add(name, spec, config.seed_for("domain adapter"))
    parts.set_adapter(MERGED, side_by_side([parts.copy_adapter(domain) for domain in domains]))
    if absorb.last_mile.epochs:
        parts.hold_to(hidden)
    gate = PerplexityGate(parts, retention_ids_BT, tuple(specs), absorb)
    publisher.publish_body(parts.body, parts.layers)
    merger = Merger(parts, text, config)
    return CloudModel(parts, specs, gate, model_release, anchor_release, sizes, relay_trainer, merger)


class PerplexityGate:
    """Accepts an adapter as strong as the FM's perplexity on public text allows.

    Args:
        parts: The FM, whose adapters do nothing yet.
        retention_ids_BT: Windows of public text, int64 [B, T].
        names: Names of the adapters.
        settings: Limits.

    Attributes:
        perplexity_before: Perplexity of the FM alone.
        retention: Perplexity with each adapter in place, by its name.
    """

    def __init__(
        self, parts: DecoderParts, retention_ids_BT: torch.Tensor, names: tuple[str, ...], settings: AbsorbSettings
    ) -> None:
        self._parts = parts
        self._settings = settings
        self._ids_BT = retention_ids_BT
        self._entering = parts.at_suffix(retention_ids_BT.tolist())
        self.perplexity_before = self._perplexity(None)
        self.retention = dict.fromkeys(names, self.perplexity_before)

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """Plug an adapter in with the largest accepted share of its strength; if none is, the previous one stays."""
        before, settings = self._parts.copy_adapter(name), self._settings

        def judge(share: float) -> Verdict:
            self._parts.set_adapter(name, weakened(tensors, share))
            found, limit = self._perplexity(name), settings.max_retention_increase
            return verdict_on_perplexity(name, found, self.perplexity_before, limit, share)

        verdict = strongest_accepted(judge, settings.least_share)
        self._parts.set_adapter(name, weakened(tensors, verdict.share) if verdict.accepted else before)
        if verdict.accepted:
            self.retention[name] = verdict.perplexity
        return verdict

    def _perplexity(self, adapter: str | None) -> float:
        return self._parts.perplexity(self._ids_BT, self._entering, adapter)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for ``load_state_dict``."""
        return {"retention": self.retention, "perplexity_before": self.perplexity_before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of ``state``."""
        self.retention, self.perplexity_before = state["retention"], state["perplexity_before"]
