"""A foundation model (FM) that writes: it teaches domain models by its text, and a gate watches what it forgets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import side_by_side, sparse_sum, weakened
from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config.learning import MergeMethod
from gaisnet.learning.gate import Verdict, gate, strongest
from gaisnet.learning.relay import Distillation, TaskTemplate
from gaisnet.messages import AnchorRelease, SmashedData
from gaisnet.models.foundation import Foundation
from gaisnet.models.preemption import pause_within
from gaisnet.models.ragged import Ragged
from gaisnet.progress import Progress
from gaisnet.tiers.cloud.decoder_parts import DecoderParts
from gaisnet.tiers.cloud.model import MERGED, Sizes
from gaisnet.tiers.cloud.relay_trainer import RelayTrainer
from gaisnet.tiers.cloud.synthetic_text import SyntheticText
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.publisher import Publisher
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, RequestGradients
from gaisnet.tiers.split.trainable_body import TrainingResult


class DecoderCloudModel:
    """A decoder as the cloud runs it; see ``CloudModel``.

    Args:
        foundation: The FM; adapters are put beside its late layers, the weights stay as they are.
        layout: Whose layers are whose.
        shapes: What is public about each domain's task, by domain.
        retention_text: Public text that no domain trains on, to watch general ability with.
        progress: Told while it writes and teaches.
        publisher: Serves it, and the adapters that are plugged in.

    Raises:
        DataError: Too little public text.
    """

    def __init__(
        self,
        foundation: Foundation,
        layout: Layout,
        shapes: Mapping[str, TaskTemplate],
        retention_text: str,
        progress: Progress,
        publisher: Publisher,
    ) -> None:
        self._config = config = layout.config
        self._layout = layout
        self._publisher = publisher
        self._model = model = DecoderParts(foundation, layout, publisher.compute_lock)
        absorb = config.absorb
        self._retention_ids_BT = model.windows(retention_text, absorb.retention_windows, absorb.retention_tokens)
        free_text_BT = model.free_text()
        recipe, domain_body = model.make_domain_body(free_text_BT)
        # All of these are taken before adapters stand between the layers and their weights.
        self.model_release = model.release(recipe, domain_body)
        free_text = free_text_BT.tolist()
        hidden = model.at_suffix(free_text[: config.fine_tune.anchor_sequences])
        self.anchor_release = AnchorRelease(torch.tensor(hidden.lengths, dtype=torch.int32), hidden.rows_ND)
        foundation_params, split_device_params = model.num_parameters()
        self.sizes = Sizes(foundation_params, layout.num_layers, len(recipe.kept), split_device_params)
        pause_within({*model.body.layers.values(), *domain_body.layers.values()}, publisher.compute_lock.pause)
        self._adapter_of = {edge.domain: edge.adapter for edge in config.edges}
        self._learning = tuple(edge.domain for edge in config.learning_edges())
        self.names = (*self._learning, MERGED)
        self._text = SyntheticText(free_text, shapes, self._adapter_of, model, layout)
        self._relay_trainer = RelayTrainer(model, domain_body, layout, recipe, self._text, progress)
        self.relays = self._relay_trainer.relays
        self._add_adapters()
        if config.absorb.last_mile.epochs:
            model.hold_to(hidden)
        self._retention_inputs: Ragged = model.at_suffix(self._retention_ids_BT.tolist())
        self.perplexity_before = self._perplexity(None)
        # With each adapter that is in place; at the start they are all zero.
        self.retention = dict.fromkeys(self.names, self.perplexity_before)
        publisher.publish_body(model.body, model.layers)

    def _add_adapters(self) -> None:
        seed = self._config.seed_for("domain adapter")
        for name in self.names:
            self._model.add(name, self.spec(name), seed)
        self.put(MERGED, side_by_side([self.adapter(domain) for domain in self._learning]))

    # -- down ----------------------------------------------------------------------------------------------------------

    def teach(self, domain: str, cycle: int) -> Distillation | None:
        """Write text for a domain and distil the FM into its DM; see ``CloudModel``.

        A relay that does not help on text that it did not learn from is not kept: the one before stays.
        """
        merges = len(self._learning) > 1 and domain in self._learning and "regression" in self._config.absorb.merge.ways
        if domain in self.relays or merges:
            self._text.write(domain, cycle)
        return self._relay_trainer.teach(domain, self._adapter_of[domain])

    # -- up ------------------------------------------------------------------------------------------------------------

    def spec(self, name: str) -> LoraSpec:
        """See ``CloudModel``."""
        return self._layout.domain_spec(len(self._learning) if name == MERGED else 1)

    def adapter(self, name: str) -> AdapterTensors:
        """See ``CloudModel``."""
        return self._model.copy_adapter(name)

    def put(self, name: str, tensors: AdapterTensors) -> None:
        """See ``CloudModel``."""
        self._model.set_adapter(name, tensors)

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """As strong as perplexity on public text lets it; see ``CloudModel``."""
        before, absorb = self.adapter(name), self._config.absorb

        def judge(share: float) -> Verdict:
            self.put(name, weakened(tensors, share))
            return gate(name, self._perplexity(name), self.perplexity_before, absorb.max_retention_increase, share)

        verdict = strongest(judge, absorb.least_share)
        self.put(name, weakened(tensors, verdict.share) if verdict.accepted else before)
        if verdict.accepted:
            self.retention[name] = verdict.perplexity
        return verdict

    def merges(self) -> dict[str, AdapterTensors]:
        """See ``CloudModel``. A single domain's adapter needs no merging: the merged adapter is that adapter."""
        if len(self._learning) == 1:
            return {"the only one": self.adapter(self._learning[0])}
        return {way: self._merged(way) for way in self._config.absorb.merge.ways}

    def set_gradient_bounds(self, gradient_bounds: GradientBounds) -> None:
        """See ``CloudModel``."""
        self._model.gradient_bounds = gradient_bounds

    def learn(
        self, members: Sequence[Member], labels: RequestGradients, schedule: TrainingSchedule, progress: Progress
    ) -> TrainingResult:
        """Pulled toward what the FM makes of its own text without adapters; see ``CloudModel``."""
        return self._model.train_adapter(members, labels, schedule, progress)

    def _merged(self, method: MergeMethod) -> AdapterTensors:
        settings, model = self._config.absorb.merge, self._model
        if method == "regression":
            entering = {domain: model.at_suffix(self._text.all_of(domain)) for domain in self._learning}
            return model.merged(entering, model.at_suffix(self._text.free))
        adapters = [self.adapter(domain) for domain in self._learning]
        if method == "sum":
            return side_by_side(adapters, settings.weight)
        return sparse_sum(adapters, method, settings.weight, settings.density, self._config.seed_for("merge"))

    def _perplexity(self, adapter: str | None) -> float:
        """The FM's perplexity on public text, with an adapter or as it is."""
        return self._model.perplexity(self._retention_ids_BT, self._retention_inputs, adapter)

    def publish(self, name: str, version: int) -> None:
        """See ``CloudModel``."""
        self._publisher.publish_adapter(name, version, self.spec(name), self.adapter(name))

    # -- asked by edges, and after a restart ---------------------------------------------------------------------------

    def prefix(self, smashed: SmashedData) -> Activations:
        """See ``CloudModel``."""
        return self._model.prefix(smashed)

    def output_rows(self, inputs: Activations, adapter: str | None) -> Tensor:
        """See ``CloudModel``."""
        return self._model.output_rows(inputs, adapter)

    def state(self) -> dict[str, Any]:
        """See ``CloudModel``."""
        return {
            "retention": self.retention,
            "perplexity_before": self.perplexity_before,
            "texts": self._text.of,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """See ``CloudModel``."""
        self.retention, self.perplexity_before = state["retention"], state["perplexity_before"]
        self._text.of = state["texts"]
