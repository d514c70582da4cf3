"""The cloud: holds the foundation model (FM), teaches domain models with text that it writes, takes adapters in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import side_by_side, sparse_sum, weakened
from gaisnet.adapters.state import AdapterTensors, check_same_shapes
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.checkpoint import digest_of, under
from gaisnet.config import Config
from gaisnet.errors import AdapterError, StaleAdapter, UnexpectedMessage
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyRequest,
    Done,
    Message,
    ModelRequest,
    Role,
    SmashedData,
)
from gaisnet.models.foundation import Foundation
from gaisnet.models.pauses import pause_within
from gaisnet.models.ragged import Ragged
from gaisnet.progress import Progress, silent
from gaisnet.relay.downward import Distillation, TaskShape
from gaisnet.relay.upward import Verdict, gate, strongest
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.foundation_model import FoundationModel
from gaisnet.tiers.layout import Layout
from gaisnet.tiers.outlet import NoOutlet, Outlet
from gaisnet.tiers.teacher import Teacher
from gaisnet.tiers.texts import Texts

MERGED = "merged"


@dataclass(frozen=True)
class Sizes:
    """What a run's models hold, in layers and parameters."""

    foundation_params: int
    foundation_layers: int
    domain_layers: int
    split_device_params: int  # of the largest split device


class Cloud:
    """Owns the FM and the adapters that plug into it.

    Args:
        foundation: The FM; adapters are put beside its late layers, the weights stay as they are.
        config: The run's configuration.
        shapes: What is public about each domain's task, by domain.
        retention_text: Public text that no domain trains on, to watch general ability with.
        progress: Told while it generates and distils.
        outlet: Serves the FM and the adapters that are plugged in; None if nobody does.

    Raises:
        CutError: The configuration does not fit the FM.
        DataError: Too little public text.
    """

    def __init__(
        self,
        foundation: Foundation,
        config: Config,
        shapes: Mapping[str, TaskShape],
        retention_text: str,
        progress: Progress = silent,
        outlet: Outlet | None = None,
    ) -> None:
        self.layout = Layout(config, len(foundation.decoder.layers))
        self._config = config
        self._outlet = outlet = outlet or NoOutlet()
        self._model = model = FoundationModel(foundation, self.layout, outlet.turn)
        absorb = config.absorb
        self._retention_ids_BT = model.windows(retention_text, absorb.retention_windows, absorb.retention_tokens)
        free_text_BT = model.free_text()
        recipe, domain_body = model.make_domain_body(free_text_BT)
        # All of these are taken before adapters stand between the layers and their weights.
        self.model_release = model.release(recipe, domain_body)
        self.model_digest = digest_of(self.model_release.tensors)
        free_text = free_text_BT.tolist()
        hidden = model.at_suffix(free_text[: config.fine_tune.anchor_sequences])
        self.anchor_release = AnchorRelease(torch.tensor(hidden.lengths, dtype=torch.int32), hidden.rows_ND)
        foundation_params, split_device_params = model.num_parameters()
        self.sizes = Sizes(foundation_params, self.layout.num_layers, len(recipe.kept), split_device_params)
        pause_within({*model.body.layers.values(), *domain_body.layers.values()}, outlet.turn.pause)
        self.adapter_of = {edge.domain: edge.adapter for edge in config.edges}
        self.learning = tuple(edge.domain for edge in config.learning_edges())
        self._texts = Texts(free_text, shapes, self.adapter_of, model, self.layout)
        self._teacher = Teacher(model, domain_body, self.layout, recipe, self._texts, progress)
        self._evaluated: dict[str, Activations] = {}
        self.versions: dict[Role, dict[str, int]] = {
            "relay": dict.fromkeys(shapes, 0),
            "domain": dict.fromkeys(self.learning, 0),
        }
        self._add_adapters()
        self._whole = {
            domain: model.adapter(domain) for domain in self.learning
        }  # as they came up; the FM may have less
        self._retention_inputs: Ragged = model.at_suffix(self._retention_ids_BT.tolist())
        self.perplexity_before = self._perplexity(None)
        # With each adapter that is in place; at the start they are all zero.
        self.retention = dict.fromkeys((*self.learning, MERGED), self.perplexity_before)
        outlet.put_body(model.body, model.layers)
        self._put_out(*self.learning, MERGED)

    def _add_adapters(self) -> None:
        seed = self._config.seed_for("domain adapter")
        for domain in self.learning:
            self._model.add(domain, self.layout.domain_spec(), seed)
        self._model.add(MERGED, self.layout.domain_spec(len(self.learning)), seed)
        self._model.put(MERGED, side_by_side([self._model.adapter(domain) for domain in self.learning]))

    # -- down ----------------------------------------------------------------------------------------------------------

    def distil(self, domain: str, cycle: int) -> Distillation | None:
        """Write text for a domain and distil the FM into its DM; None where there is no relay.

        A relay that does not help on text that it did not learn from is not kept: the one before stays.
        """
        merges = domain in self.learning and self._config.absorb.merge.method == "regression"
        if domain in self._teacher.relays or merges:
            self._texts.write(domain, cycle)
        result = self._teacher.teach(domain, self.adapter_of[domain])
        if result is not None and result.helped:
            self.versions["relay"][domain] = cycle + 1
        return result

    def release(self, role: Role, domain: str) -> AdapterRelease:
        """The relay that a domain's DM should have, or its domain adapter, whole, as it was last accepted."""
        tensors = self._teacher.relays[domain] if role == "relay" else self._whole[self.adapter_of[domain]]
        return AdapterRelease(role, self.version(role, domain), tensors)

    def version(self, role: Role, domain: str) -> int:
        """Of what ``release`` gives; 0 where there is no relay."""
        return self.versions[role][domain if role == "relay" else self.adapter_of[domain]]

    def relay(self, domain: str) -> AdapterTensors:
        """Of a domain's DM; empty where models have none."""
        return self._teacher.relays.get(domain, {})

    # -- up ------------------------------------------------------------------------------------------------------------

    def absorb(self, updates: Mapping[str, AdapterUpdate]) -> list[Verdict]:
        """Plug domain adapters into the FM where the gate lets them, and merge what is in place. Updates by domain."""
        return [*(self._try(domain, update) for domain, update in updates.items()), self._try_merged()]

    def _try_merged(self) -> Verdict:
        verdict = self._let_in(MERGED, self._merged())
        if verdict.accepted:
            self._put_out(MERGED)
        return verdict

    def _try(self, domain: str, update: AdapterUpdate) -> Verdict:
        try:
            check_same_shapes(domain, self._model.adapter(domain), update.tensors)
            if update.base != self.versions["domain"][domain]:
                raise StaleAdapter(domain, self.versions["domain"][domain], update.base)
        except AdapterError as error:
            return Verdict(False, domain, math.nan, math.nan, str(error))
        verdict = self._let_in(domain, update.tensors)
        if verdict.accepted:
            self.versions["domain"][domain] = update.version
            self._whole[domain] = update.tensors
            self._put_out(domain)
        return verdict

    def _let_in(self, name: str, tensors: AdapterTensors) -> Verdict:
        """Plug an adapter in, as strong as the gate lets it; what was there before stays if it does not."""
        before, absorb = self._model.adapter(name), self._config.absorb

        def judge(share: float) -> Verdict:
            self._model.put(name, weakened(tensors, share))
            return gate(name, self._perplexity(name), self.perplexity_before, absorb.max_retention_increase, share)

        verdict = strongest(judge, absorb.least_share)
        self._model.put(name, weakened(tensors, verdict.share) if verdict.accepted else before)
        if verdict.accepted:
            self.retention[name] = verdict.perplexity
        return verdict

    def _merged(self) -> AdapterTensors:
        """Of what is in place, as the configuration says."""
        settings, model = self._config.absorb.merge, self._model
        method = settings.method
        if method == "regression":
            entering = {domain: model.at_suffix(self._texts.all_of(domain)) for domain in self.learning}
            return model.merged(entering, model.at_suffix(self._texts.free))
        adapters = [model.adapter(domain) for domain in self.learning]
        if method == "sum":
            return side_by_side(adapters, settings.weight)
        return sparse_sum(adapters, method, settings.weight, settings.density, self._config.seed_for("merge"))

    def _perplexity(self, adapter: str | None) -> float:
        """The FM's perplexity on public text, with an adapter or as it is."""
        return self._model.perplexity(self._retention_ids_BT, self._retention_inputs, adapter)

    def adapter(self, name: str) -> tuple[LoraSpec, AdapterTensors]:
        """Shape and tensors of a domain's adapter or of the merged one, as they are plugged in now."""
        num_merged = len(self.learning) if name == MERGED else 1
        return self.layout.domain_spec(num_merged), self._model.adapter(name)

    def _put_out(self, *names: str) -> None:
        """What is plugged in now is served from now on."""
        versions = self.versions["domain"]
        for name in names:
            version = max(versions.values()) if name == MERGED else versions[name]
            self._outlet.put_adapter(name, version, *self.adapter(name))

    # -- after a restart -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a run has changed, for ``restore``; everything else follows from the configuration."""
        state = {
            "versions": self.versions,
            "retention": self.retention,
            "perplexity_before": self.perplexity_before,
            "texts": self._texts.of,
        }
        tensors = {
            f"adapter/{name}/{key}": t
            for name in (*self.learning, MERGED)
            for key, t in self._model.adapter(name).items()
        }
        tensors |= {f"whole/{domain}/{key}": t for domain, whole in self._whole.items() for key, t in whole.items()}
        tensors |= {
            f"relay/{domain}/{key}": t for domain, relay in self._teacher.relays.items() for key, t in relay.items()
        }
        return state, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from where ``state`` was taken. Raises ``AdapterMismatch`` if the configuration is another one."""
        self.versions, self.retention = state["versions"], state["retention"]
        self.perplexity_before, self._texts.of = state["perplexity_before"], state["texts"]
        for name in (*self.learning, MERGED):
            self._model.put(name, under(f"adapter/{name}/", tensors))
        for domain in self._whole:
            self._whole[domain] = under(f"whole/{domain}/", tensors) or self._model.adapter(domain)
        for domain in self._teacher.relays:
            self._teacher.relays[domain] = under(f"relay/{domain}/", tensors)
        self._put_out(*self.learning, MERGED)

    # -- asked by edges ------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> Message:
        """Answer an edge. Raises ``UnexpectedMessage``."""
        match message:
            case ModelRequest():
                return self.model_release
            case AnchorRequest():
                return self.anchor_release
            case SmashedData(split="test"):
                self._evaluated[message.owner] = self._model.prefix(message)  # once: it is frozen
                return Done()
            case BodyRequest() if message.owner in self._evaluated:
                return self._output(message)
            case _:
                raise UnexpectedMessage("the cloud", type(message).__name__)

    def _output(self, request: BodyRequest) -> BodyOutput:
        inputs = self._evaluated[request.owner]
        rows_ND = self._model.output_rows(inputs, request.adapter)
        examples_E = torch.arange(len(inputs), dtype=torch.int32)
        return BodyOutput("test", 0, sum(inputs.num_labels), examples_E, rows_ND)
