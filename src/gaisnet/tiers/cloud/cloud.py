"""The cloud: holds the foundation model (FM), teaches domain models, takes adapters in, and answers edges."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, check_same_shapes
from gaisnet.adapters.tuning import AdapterSpec
from gaisnet.checkpoint import digest_of, under
from gaisnet.config import Config, EdgeSettings
from gaisnet.data.examples import Input
from gaisnet.errors import AdapterError, OutOfBounds, StaleAdapter, UnexpectedMessage
from gaisnet.learning.gate import Verdict, refused
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
from gaisnet.tiers.cloud.decoder_model import DecoderCloudModel
from gaisnet.tiers.cloud.device_client import DeviceClient
from gaisnet.tiers.cloud.encoder_model import EncoderCloudModel
from gaisnet.tiers.cloud.model import MERGED, CloudModel, Sizes
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.layout import Layout
from gaisnet.tiers.split.publisher import NoPublisher, Publisher
from gaisnet.tiers.split.step import Member


class Cloud:
    """Owns the FM and the adapters that plug into it.

    Args:
        foundation: The FM; adapters are put beside its late layers, the weights stay as they are.
        config: The run's configuration.
        shapes: What is public about each domain's task, by domain.
        retention_text: Public text that no domain trains on, to watch the general ability of a decoder with.
        progress: Told while it generates and distils.
        publisher: Serves the FM and the adapters that are plugged in; None if nobody does.
        public_inputs: Of an encoder, in place of text: unlabelled texts or images that are nobody's secret.

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
            self._model: CloudModel = EncoderCloudModel(foundation, layout, public_inputs, publisher.compute_lock)
        else:
            self._model = DecoderCloudModel(foundation, layout, shapes, retention_text, progress, publisher)
        self.model_digest = digest_of(self.model_release.tensors)
        self._adapter_of = {edge.domain: edge.adapter for edge in config.edges}
        self.learning = tuple(edge.domain for edge in config.learning_edges())
        self._config = config
        self._edge_of = {edge.domain: edge for edge in config.edges}
        self._heads = {device.name: device.head_layers for _, device in config.each_device()}
        self._hidden_size = foundation.model.config.hidden_size
        self._longest = bounds.max_positions(foundation.model.config, config.model.most_tokens)
        self._classifies = foundation.family.is_encoder
        self._model.set_gradient_bounds(
            GradientBounds.from_release(self.model_release, config.tail_layers, self._classifies)
        )
        self._acceptance = AdapterAcceptance(self._model, config, progress)
        self._last_mile = bool(config.absorb.last_mile.epochs)
        self._travelling = {name for edge in config.learning_edges() for name in edge.travelling}
        self._activations: dict[tuple[str, Split], Activations] = {}  # behind the prefix, which is frozen
        self.versions: dict[Role, dict[str, int]] = {
            "relay": dict.fromkeys(shapes, 0),
            "domain": dict.fromkeys(self.learning, 0),
        }
        # As they came up; the FM may have less.
        self._whole = {domain: self._model.adapter(domain) for domain in self.learning}
        self._put_out(*self.adapters)

    @property
    def model_release(self) -> ModelRelease:
        """What edges and devices need of the FM."""
        return self._model.model_release

    @property
    def anchor_release(self) -> AnchorRelease:
        """What the FM makes of text that it wrote; empty where it writes none."""
        return self._model.anchor_release

    @property
    def sizes(self) -> Sizes:
        """Of the models."""
        return self._model.sizes

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters: of the domains that learn, and ``MERGED`` where there is such a one."""
        return self._model.names

    @property
    def retention(self) -> Mapping[str, float]:
        """What each adapter in place costs in general ability, by its name.

        Of a decoder perplexity on public text, of an encoder how far it moves the features of public inputs; empty
        where there is nothing public.
        """
        return self._model.retention

    # -- down ----------------------------------------------------------------------------------------------------------

    def distil(self, domain: str, cycle: int) -> Distillation | None:
        """Teach a domain's DM what the FM sees; None where there is no relay."""
        result = self._model.teach(domain, cycle)
        if result is not None and result.helped:
            self.versions["relay"][domain] = cycle + 1
        return result

    def release(self, role: Role, domain: str) -> AdapterRelease:
        """The relay that a domain's DM should have, or its domain adapter, whole, as it was last accepted."""
        tensors = self._model.relays[domain] if role == "relay" else self._whole[self._adapter_of[domain]]
        return AdapterRelease(role, self.version(role, domain), tensors)

    def version(self, role: Role, domain: str) -> int:
        """Of what ``release`` gives; 0 where there is no relay."""
        return self.versions[role][domain if role == "relay" else self._adapter_of[domain]]

    def relay(self, domain: str) -> AdapterTensors:
        """Of a domain's DM; empty where models have none."""
        return self._model.relays.get(domain, {})

    # -- up ------------------------------------------------------------------------------------------------------------

    def absorb(self, updates: Mapping[str, AdapterUpdate], cycle: int, devices: DeviceClient) -> list[Verdict]:
        """Plug domain adapters into the FM where they may, and merge what is in place.

        Args:
            updates: By domain.
            cycle: That ends.
            devices: Asked for scores and gradients.
        """
        verdicts = self._take(updates, devices)
        merged = self._acceptance.merge(devices)
        if merged is None:
            return verdicts
        about_merged = [merged]
        if self._last_mile and merged.accepted:
            about_merged.append(self._acceptance.last_mile(self._members(devices.share()), cycle, devices))
        if merged.accepted:
            self._put_out(MERGED)
        return [*verdicts, *about_merged]

    def _members(self, owners: Sequence[str]) -> list[Member]:
        """Devices that learn in the last mile, out of those whose activations are here."""
        return [Member(owner, self._activations[owner, "train"]) for owner in owners]

    def _take(self, updates: Mapping[str, AdapterUpdate], devices: DeviceClient) -> list[Verdict]:
        misfits = {domain: self._misfit(domain, update) for domain, update in updates.items()}
        unfit = {domain: refused(domain, why) for domain, why in misfits.items() if why}
        fitting = {domain: update.tensors for domain, update in updates.items() if domain not in unfit}
        found = {verdict.adapter: verdict for verdict in self._acceptance.take(fitting, devices)}
        for domain, verdict in found.items():
            if verdict.accepted:
                self.versions["domain"][domain] = updates[domain].version
                self._whole[domain] = updates[domain].tensors
                self._put_out(domain)
        return [(unfit | found)[domain] for domain in updates]

    def _misfit(self, domain: str, update: AdapterUpdate) -> str:
        """Why an update cannot even be tried; nothing if it can."""
        try:
            check_same_shapes(domain, self._model.adapter(domain), update.tensors)
            if update.base != self.versions["domain"][domain]:
                raise StaleAdapter(domain, self.versions["domain"][domain], update.base)
        except AdapterError as error:
            return str(error)
        return ""

    def adapter(self, name: str) -> tuple[AdapterSpec, AdapterTensors]:
        """Shape and tensors of a domain's adapter or of the merged one, as they are plugged in now."""
        return self._model.spec(name), self._model.adapter(name)

    def _put_out(self, *names: str) -> None:
        """What is plugged in now is served from now on."""
        versions = self.versions["domain"]
        for name in names:
            self._model.publish(name, max(versions.values()) if name == MERGED else versions[name])

    # -- after a restart -----------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that a run has changed, for ``restore``; everything else follows from the configuration."""
        adapters = {name: self._model.adapter(name) for name in self.adapters}
        groups = {"adapter": adapters, "whole": self._whole, "relay": self._model.relays}
        tensors = {
            f"{group}/{name}/{key}": tensor
            for group, members in groups.items()
            for name, adapter in members.items()
            for key, tensor in adapter.items()
        }
        return {"versions": self.versions, **self._model.state()}, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from where ``state`` was taken. Raises ``AdapterMismatch`` if the configuration is another one."""
        self.versions = state["versions"]
        self._model.restore(state)
        for name in self.adapters:
            self._model.put(name, under(f"adapter/{name}/", tensors))
        for domain in self._whole:
            self._whole[domain] = under(f"whole/{domain}/", tensors) or self._model.adapter(domain)
        for domain in self._model.relays:
            self._model.relays[domain] = under(f"relay/{domain}/", tensors)
        self._put_out(*self.adapters)

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
                self._activations[message.owner, message.split] = self._model.prefix(message)
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

    def check(self, domain: str, asked: Message, answer: Message) -> None:
        """Raise ``OutOfBounds`` or ``AdapterError`` where the answer of a domain's edge cannot be meant."""
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
        """Examples and label tokens: of a score on the FM, those whose activations are here."""
        if not isinstance(asked, Evaluate) or asked.body != "foundation":
            return MOST, MOST
        keys = [(device.name, asked.split) for device in edge.devices]
        here = [self._activations[key] for key in keys if key in self._activations]
        return sum(map(len, here)), sum(sum(inputs.num_labels) for inputs in here)

    def _output(self, request: BodyRequest) -> BodyOutput:
        inputs = self._activations[request.owner, request.split]
        rows_ND = self._model.output_rows(inputs, request.adapter)
        examples_E = torch.arange(len(inputs), dtype=torch.int32)
        return BodyOutput(request.split, 0, sum(inputs.num_labels), examples_E, rows_ND)


def _check_names(party: str, what: str, found: Sequence[str], known: Collection[str]) -> None:
    if len(set(found)) < len(found) or not set(known).issuperset(found):
        raise OutOfBounds(party, what, f"{len(found)} names, the first '{found[0][:64]}'", f"some of {sorted(known)}")
