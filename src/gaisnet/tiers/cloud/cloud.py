"""The cloud: holds the foundation model (FM), fits relays for domain models, absorbs adapters, and answers edges."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, check_same_shapes
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec
from gaisnet.checkpoint import digest_of, under
from gaisnet.config import Config, EdgeSettings
from gaisnet.data.examples import Input
from gaisnet.errors import AdapterError, OutOfBounds, StaleAdapter, UnexpectedMessage
from gaisnet.learning.gate import Verdict, reject
from gaisnet.learning.relay import Distillation, TaskTemplate
from gaisnet.messages import (
    MOST,
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyRequest,
    Done,
    Evaluate,
    EvaluationReport,
    FineTune,
    Installed,
    LengthsOfDevices,
    Message,
    ModelRelease,
    ModelRequest,
    Role,
    Shared,
    SmashedData,
    Split,
    TrafficReport,
)
from gaisnet.models.foundation import Foundation
from gaisnet.progress import Progress, silent
from gaisnet.tiers.cloud.acceptance import AdapterAcceptance
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.decoder_model import build_decoder_model
from gaisnet.tiers.cloud.device_client import DeviceClient
from gaisnet.tiers.cloud.encoder_model import build_encoder_model
from gaisnet.tiers.cloud.model import Sizes
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.publisher import NoPublisher, Publisher
from gaisnet.tiers.split.step import Member


class Cloud:
    """Owns the FM and the adapters that plug into it.

    Args:
        foundation: The FM; adapters are put beside its late layers, its weights do not change.
        config: The run's configuration.
        shapes: Public description of each domain's task, by domain.
        retention_text: Public text that no domain trains on, to measure a decoder's general ability.
        progress: Told while text is generated and relays are fitted.
        publisher: Serves the FM and its adapters; None if they are not served.
        public_inputs: For an encoder, in place of text: unlabelled public texts or images.

    Raises:
        CutError: The configuration does not fit the FM.
        ConfigError: It asks of an encoder what only a decoder can do.
        DataError: Too little public text, or inputs that the FM cannot read.
    """

    def __init__(
        self,
        foundation: Foundation,
        config: Config,
        shapes: Mapping[str, TaskTemplate],
        retention_text: str,
        progress: Progress = silent,
        publisher: Publisher | None = None,
        public_inputs: Sequence[Input] = (),
    ) -> None:
        publisher = publisher or NoPublisher()
        layout = Layout(config, foundation.model.config.num_hidden_layers, foundation.family)
        if foundation.family.is_encoder:
            self._model = build_encoder_model(foundation, layout, public_inputs, publisher.compute_lock)
        else:
            self._model = build_decoder_model(foundation, layout, shapes, retention_text, progress, publisher)
        self.model_digest = digest_of(self.model_release.tensors)
        self._adapter_of = {edge.domain: edge.adapter for edge in config.edges}
        self.learning = tuple(edge.domain for edge in config.learning_edges())
        self._config = config
        self._edge_of = {edge.domain: edge for edge in config.edges}
        self._heads = {device.name: device.head_layers for _, device in config.each_device()}
        self._hidden_size = foundation.model.config.hidden_size
        self._longest = bounds.max_positions(foundation.model.config, config.model.most_tokens)
        self._classifies = foundation.family.is_encoder
        self._model.body.gradient_bounds = GradientBounds.from_release(
            self.model_release, config.tail_layers, self._classifies
        )
        self._publisher = None if foundation.family.is_encoder else publisher  # an encoder writes no answers
        self._acceptance = AdapterAcceptance(self._model, config, progress)
        self._last_mile = bool(config.absorb.last_mile.epochs)
        self._travelling = {name for edge in config.learning_edges() for name in edge.travelling}
        self._activations: dict[tuple[str, Split], Activations] = {}  # behind the prefix, which is frozen
        self.versions: dict[Role, dict[str, int]] = {
            "relay": dict.fromkeys(shapes, 0),
            "domain": dict.fromkeys(self.learning, 0),
        }
        # at full strength; the FM may have them weakened
        self._whole = {domain: self._model.body.copy_adapter(domain) for domain in self.learning}
        self._publish(*self.adapters)

    @property
    def model_release(self) -> ModelRelease:
        """Everything that edges and devices need of the FM."""
        return self._model.model_release

    @property
    def anchor_release(self) -> AnchorRelease:
        """The FM's hidden states on text that it generated; empty for an encoder."""
        return self._model.anchor_release

    @property
    def sizes(self) -> Sizes:
        """Sizes of the models."""
        return self._model.sizes

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters: the domains that train, and ``MERGED`` if there is a merged one."""
        return tuple(self._model.specs)

    @property
    def retention(self) -> Mapping[str, float]:
        """Cost of each adapter in place in general ability, by its name.

        For a decoder the perplexity on public text, for an encoder the drift of features of public inputs; empty
        without public inputs.
        """
        return self._model.gate.retention

    # -- down ----------------------------------------------------------------------------------------------------------

    def train_relay(self, domain: str, cycle: int) -> Distillation | None:
        """Fit a domain's relay to the FM; None if there is no relay."""
        result = None if self._model.relay_trainer is None else self._model.relay_trainer.train_relay(domain, cycle)
        if result is not None and result.helped:
            self.versions["relay"][domain] = cycle + 1
        return result

    def adapter_release(self, role: Role, domain: str) -> AdapterRelease:
        """Return a domain's current relay, or its domain adapter at full strength, as last accepted."""
        tensors = self._model.relays[domain] if role == "relay" else self._whole[self._adapter_of[domain]]
        return AdapterRelease(role, self.version(role, domain), tensors)

    def version(self, role: Role, domain: str) -> int:
        """Return the version that ``release`` gives; 0 if there is no relay."""
        return self.versions[role][domain if role == "relay" else self._adapter_of[domain]]

    def relay(self, domain: str) -> AdapterTensors:
        """Return the relay of a domain's DM; empty if models have none."""
        return self._model.relays.get(domain, {})

    # -- up ------------------------------------------------------------------------------------------------------------

    def absorb(self, updates: Mapping[str, AdapterUpdate], cycle: int, devices: DeviceClient) -> list[Verdict]:
        """Plug accepted domain adapters into the FM, and merge those in place.

        Args:
            updates: Updates by domain.
            cycle: The cycle that ends.
            devices: Asked for scores and gradients.
        """
        verdicts = self._try_updates(updates, devices)
        merged = self._acceptance.merge(devices)
        if merged is None:
            return verdicts
        about_merged = [merged]
        if self._last_mile and merged.accepted:
            about_merged.append(
                self._acceptance.last_mile(self._members(devices.request_activations()), cycle, devices)
            )
        if merged.accepted:
            self._publish(MERGED)
        return [*verdicts, *about_merged]

    def _members(self, owners: Sequence[str]) -> list[Member]:
        """Return the devices of the last mile: those whose activations are here."""
        return [Member(owner, self._activations[owner, "train"]) for owner in owners]

    def _try_updates(self, updates: Mapping[str, AdapterUpdate], devices: DeviceClient) -> list[Verdict]:
        misfits = {domain: self._misfit(domain, update) for domain, update in updates.items()}
        rejected = {domain: reject(domain, why) for domain, why in misfits.items() if why}
        fitting = {domain: update.tensors for domain, update in updates.items() if domain not in rejected}
        found = {verdict.adapter: verdict for verdict in self._acceptance.try_adapters(fitting, devices)}
        for domain, verdict in found.items():
            if verdict.accepted:
                self.versions["domain"][domain] = updates[domain].version
                self._whole[domain] = updates[domain].tensors
                self._publish(domain)
        return [(rejected | found)[domain] for domain in updates]

    def _misfit(self, domain: str, update: AdapterUpdate) -> str:
        """Return why an update cannot be tried; empty if it can."""
        try:
            check_same_shapes(domain, self._model.body.copy_adapter(domain), update.tensors)
            if update.base != self.versions["domain"][domain]:
                raise StaleAdapter(domain, self.versions["domain"][domain], update.base)
        except AdapterError as error:
            return str(error)
        return ""

    def adapter(self, name: str) -> tuple[AdapterSpec, AdapterTensors]:
        """Return shape and tensors of an adapter, as it is in place now."""
        return self._model.specs[name], self._model.body.copy_adapter(name)

    def _publish(self, *names: str) -> None:
        """Serve these adapters as they are now."""
        versions = self.versions["domain"]
        for name in names:
            version = max(versions.values()) if name == MERGED else versions[name]
            spec = self._model.specs[name]
            if self._publisher is not None and isinstance(spec, LoraSpec):
                self._publisher.publish_adapter(name, version, spec, self._model.body.copy_adapter(name))

    # -- after a restart -----------------------------------------------------------------------------------------------

    def checkpoint_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return everything that a run has changed, for ``restore``; the rest follows from the configuration."""
        adapters = {name: self._model.body.copy_adapter(name) for name in self.adapters}
        groups = {"adapter": adapters, "whole": self._whole, "relay": self._model.relays}
        tensors = {
            f"{group}/{name}/{key}": tensor
            for group, members in groups.items()
            for name, adapter in members.items()
            for key, tensor in adapter.items()
        }
        return {"versions": self.versions, **self._model.parts_state()}, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore the values of ``state``. Raises ``AdapterMismatch`` for another configuration."""
        self.versions = state["versions"]
        self._model.restore_parts(state)
        for name in self.adapters:
            self._model.body.set_adapter(name, under(f"adapter/{name}/", tensors))
        for domain in self._whole:
            self._whole[domain] = under(f"whole/{domain}/", tensors) or self._model.body.copy_adapter(domain)
        for domain in self._model.relays:
            self._model.relays[domain] = under(f"relay/{domain}/", tensors)
        self._publish(*self.adapters)

    # -- asked by edges ------------------------------------------------------------------------------------------------

    def handle(self, message: Message) -> Message:
        """Answer an edge. Raises ``UnexpectedMessage``."""
        match message:
            case ModelRequest():
                return self._model.model_release
            case AnchorRequest():
                return self._model.anchor_release
            case SmashedData() if self._may_have(message):
                self._check_smashed(message)
                self._activations[message.owner, message.split] = self._model.body.prefix(message)
                return Done()
            case BodyRequest() if (message.owner, message.split) in self._activations and (
                message.adapter is None or message.adapter in self.adapters
            ):
                return self._output(message)
            case _:
                raise UnexpectedMessage("the cloud", type(message).__name__)

    def _may_have(self, smashed: SmashedData) -> bool:
        return smashed.owner in self._heads and (smashed.split != "train" or smashed.owner in self._travelling)

    def _check_smashed(self, found: SmashedData) -> None:
        next_layer, classifies = self._heads[found.owner], self._classifies
        bounds.check_smashed(found.owner, found.split, found, next_layer, self._hidden_size, self._longest, classifies)

    def check_reply(self, domain: str, asked: Message, answer: Message) -> None:
        """Raise ``OutOfBounds`` or ``AdapterError`` if the reply of a domain's edge cannot be true."""
        party, edge = f"the edge of '{domain}'", self._edge_of[domain]
        match answer:
            case AdapterUpdate():
                base, start = self.versions["domain"][domain], self._whole[domain]
                cycle = asked.cycle if isinstance(asked, FineTune) else base
                bounds.check_edge_update(party, answer, base, start, cycle, self._config.fine_tune, len(edge.devices))
            case EvaluationReport():
                bounds.check_report(party, answer, *self._most_scored(edge, asked))
            case Installed():
                bounds.check_integer(party, "the version of its relay", answer.relay, -1)
                bounds.check_integer(party, "the version of its domain adapter", answer.domain, -1)
            case Shared():
                here = {name for name in edge.travelling if (name, "train") in self._activations}
                _check_names(party, "devices whose activations came up", answer.owners, here)
            case LengthsOfDevices():
                names = {device.name for device in edge.devices}
                _check_names(party, "devices that say how long their examples are", answer.owners, names)
            case TrafficReport():
                for field in fields(answer):
                    bounds.check_integer(party, field.name, getattr(answer, field.name), 0, 2**62)

    def _most_scored(self, edge: EdgeSettings, asked: Message) -> tuple[int, int]:
        """Return most examples and label tokens of a report: for the FM, those whose activations are here."""
        if not isinstance(asked, Evaluate) or asked.body != "foundation":
            return MOST, MOST
        keys = [(device.name, asked.split) for device in edge.devices]
        here = [self._activations[key] for key in keys if key in self._activations]
        return sum(map(len, here)), sum(sum(inputs.num_labels) for inputs in here)

    def _output(self, request: BodyRequest) -> BodyOutput:
        inputs = self._activations[request.owner, request.split]
        rows_ND = self._model.body.output_rows(inputs, request.adapter)
        examples_E = torch.arange(len(inputs), dtype=torch.int32)
        return BodyOutput(request.split, 0, sum(inputs.num_labels), examples_E, rows_ND)


def _check_names(party: str, what: str, found: Sequence[str], known: Collection[str]) -> None:
    if len(set(found)) < len(found) or not set(known).issuperset(found):
        raise OutOfBounds(party, what, f"{len(found)} names, the first '{found[0][:64]}'", f"some of {sorted(known)}")
