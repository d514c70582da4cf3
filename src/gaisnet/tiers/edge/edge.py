"""An edge: serves one domain, holds its domain model (DM), drives its devices in hybrid federated split learning."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from gaisnet.checkpoint import NoShelf, Shelf
from gaisnet.config import Config, EdgeSettings
from gaisnet.errors import GaisnetError, LinkError, NotFinite, OutOfBounds, UnexpectedMessage
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyOutputGrad,
    BodyRequest,
    Done,
    Evaluate,
    EvaluateGuest,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    LabelRequest,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    ModelRelease,
    ModelRequest,
    Role,
    Scored,
    Shared,
    ShareRequest,
    Split,
    TrafficReport,
    TrafficRequest,
)
from gaisnet.progress import Progress, silent
from gaisnet.tiers.edge.activation_store import ActivationStore
from gaisnet.tiers.edge.device_pool import DevicePool
from gaisnet.tiers.edge.hfsl import HybridLearning
from gaisnet.tiers.edge.state import EdgeState, RoundProgress, load_state
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.publisher import NoPublisher, Publisher
from gaisnet.transport.base import Link, wait
from gaisnet.transport.ledger import Ledger

M = TypeVar("M", bound=Message)
_log = logging.getLogger(__name__)


class Edge:
    """Answers the cloud and asks its devices.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        cloud: Where the foundation model can be asked.
        devices: Links to its devices, by name.
        ledger: Counts the requests that it makes, and their answers.
        shelf: Where it finds what it had when it was stopped; None if it need not survive.
        progress: Told while it learns.
        publisher: Serves the domain model and its adapters; None if nobody does.

    Raises:
        CheckpointError: What the shelf holds cannot be read.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        config: Config,
        cloud: Link,
        devices: Mapping[str, Link],
        ledger: Ledger,
        shelf: Shelf | None = None,
        progress: Progress = silent,
        publisher: Publisher | None = None,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._cloud = cloud
        self._ledger = ledger
        self._shelf: Shelf = shelf or NoShelf()
        self._publisher: Publisher = publisher or NoPublisher()
        self._device_pool = DevicePool(f"edge '{settings.name}'", devices, config.faults, self._setup_messages)
        self._devices = {device.name: device for device in settings.devices}
        self._names = list(self._devices)
        self._local = [device.name for device in settings.devices if device.mode == "local"]
        self._smashed = ActivationStore(
            settings, config.faults, self._device_pool, config.service.max_activations_mib, self._granted
        )
        self._learning = HybridLearning(settings, config, self._device_pool, self._smashed, progress)
        self._cloud_has: dict[tuple[str, Split], str] = {}  # the life of the cloud that has a device's smashed data
        self._num_classes = len(settings.labels)
        self._holding = load_state(self._shelf, config, ledger, self._publisher.compute_lock, self._num_classes)
        if self._holding:
            self._shelf.clear_arrivals()
            self._begin(self._holding)
            self._learning.start = self._domain_release()
            self._put_out_all()

    def handle(self, message: Message) -> Message:
        """Answer the cloud. Raises ``UnexpectedMessage``, or what makes the order impossible."""
        match message:
            case Install():
                return self._install(message)
            case AdapterRelease():
                return self._take(message)
            case FineTune():
                return self._fine_tune(message)
            case Evaluate(body="domain", split="validate" | "test"):
                return self._evaluate(lambda name: self._domain_output(name, message.split), message.split)
            case Evaluate(body="foundation", split="validate" | "test"):
                return self._evaluate(lambda name: self._foundation_output(name, message), message.split)
            case EvaluateGuest():
                with self._model().guest_adapters(message.relay, message.domain):
                    return self._evaluate(self._guest_output, "test")
            case LengthsRequest():
                return self._lengths()
            case ShareRequest():
                return self._share()
            case LabelRequest():
                return self._ask_owner(message)
            case TrafficRequest():
                return self._report_traffic()
            case _:
                raise UnexpectedMessage(f"edge '{self.name}'", type(message).__name__)

    def _granted(self, split: Split) -> int:
        """Examples of a split that any device may have: of a built-in domain, all that it is dealt."""
        if not self._config.deals(self._settings):
            return 0
        return self._config.data.test_examples if split == "test" else self._config.data.train_examples

    def _begin(self, held: EdgeState) -> None:
        """Forget the activations of another run."""
        self._smashed.reset_for_run(held.hidden_size, held.layout.family.is_encoder, held.longest)

    # -- what it holds -------------------------------------------------------------------------------------------------

    def _install(self, order: Install) -> Installed:
        """Have the run's model; what is there already is not asked for again."""
        held = self._holding
        if held is None or held.run != order.run or held.digest != order.model:
            same_model = held is not None and held.digest == order.model
            release = held.release if held and same_model else self._ask_cloud(ModelRequest(), ModelRelease)
            anchor = self._ask_cloud(AnchorRequest(), AnchorRelease)
            compute_lock, num_classes = self._publisher.compute_lock, self._num_classes
            held = EdgeState(self._config, order.run, order.model, release, anchor, compute_lock, num_classes)
            held.save_model(self._shelf)
            self._shelf.clear_arrivals()
            self._holding = held  # not before: where it could not be kept, the next order begins anew
            self._begin(held)
            self._cloud_has.clear()
            self._device_pool.mark_unequipped()
            self._put_out_all()
        versions = self._model().versions
        return Installed(versions["relay"], versions["domain"])

    def _take(self, release: AdapterRelease) -> Done:
        held = self._held()
        bounds.check_integer("the cloud", "the version of an adapter", release.version)
        held.install_adapter(release)
        if release.role == "relay":
            self._smashed.clear_prefixes()
        self._learning.start = self._domain_release()
        held.save_progress(self._shelf, self._ledger)
        self._put_out(release.role, release.version)
        self._device_pool.notify_devices(self._local, release)
        return Done()

    def equip_device(self, name: str) -> None:
        """Give a device its part of the model, if it lacks it. Raises why it cannot be had."""
        for error in self._device_pool.ensure_ready([name]).values():
            raise error

    def _put_out_all(self) -> None:
        """Another model: it is served from now on, with the adapters that it has, if it writes answers."""
        domain = self._model()
        if domain.generates_text:
            self._publisher.publish_body(domain.body, domain.layers)
        for role in domain.served_adapters():
            self._put_out(role, domain.versions[role])

    def _put_out(self, role: Role, version: int) -> None:
        """The adapter as it is now is finished, and served from now on."""
        if self._model().generates_text:
            self._publisher.publish_adapter(role, version, *self._model().served_adapters()[role])

    def _setup_messages(self, name: str) -> Sequence[Message]:
        """What a device must be sent before it can work."""
        held = self._held()
        settings = self._devices[name]
        release = held.release_for(settings)
        if settings.mode == "split":
            return [release]
        adapters = [adapter for adapter in (held.relay, self._learning.start) if adapter is not None]
        return [release, held.anchor, *adapters]

    def _domain_release(self) -> AdapterRelease:
        domain = self._model()
        return AdapterRelease("domain", domain.versions["domain"], domain.copy_adapter("domain"))

    def _held(self) -> EdgeState:
        if self._holding is None:
            raise UnexpectedMessage(f"edge '{self.name}', which has no model yet,", "request for its domain model")
        return self._holding

    def _model(self) -> DomainModel:
        return self._held().domain

    # -- learning ------------------------------------------------------------------------------------------------------

    def _fine_tune(self, order: FineTune) -> AdapterUpdate:
        """Edge rounds of HFSL: the split cohort learns here, local devices by themselves; then all are averaged.

        A cycle that was broken off goes on after the last round that was finished; a finished one is not repeated.
        """
        held, domain = self._held(), self._model()
        bounds.check_fine_tune_order("the cloud", order, self._config.fine_tune)
        if held.rounds is None or held.rounds.cycle != order.cycle:
            held.rounds = RoundProgress(order.cycle, domain.versions["domain"])
        while held.rounds.done < self._config.fine_tune.edge_rounds:
            held.rounds = self._learning.run_edge_round(domain, held.rounds)
            if held.rounds.done == self._config.fine_tune.edge_rounds:
                domain.versions["domain"] = order.cycle + 1
            self._put_out("domain", order.cycle + 1)
            held.save_progress(self._shelf, self._ledger)
        rounds = held.rounds
        return AdapterUpdate(
            version=order.cycle + 1,
            base=rounds.base,
            num_examples=rounds.num_examples,
            num_steps=rounds.num_steps,
            loss=rounds.loss,
            faults=rounds.faults,
            tensors=domain.copy_adapter("domain"),
        )

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _evaluate(self, output_of: Callable[[str], BodyOutput], split: Scored) -> EvaluationReport:
        """Counts and sums of all devices that can be had. Raises what the last one failed with if there is none."""
        failed, outputs = self._had(self._names, split), dict[str, BodyOutput]()
        for name in (name for name in self._names if name not in failed):
            try:
                outputs[name] = self._finite(name, output_of(name))
            except (LinkError, NotFinite) as error:  # others' may pass
                failed[name] = error
        outcomes = self._device_pool.ask_devices(outputs, EvaluationReport, self._config.faults.round_deadline_s)
        reports = []
        for name, report in outcomes.items():
            try:
                if isinstance(report, GaisnetError):
                    raise report
                self._check_report(name, report, split)
            except GaisnetError as error:
                failed[name] = error
            else:
                reports.append(report)
        for name, reason in failed.items():
            _log.warning("edge '%s' scores without %s: %s", self.name, name, reason)
        if not reports:
            raise next(iter(failed.values()))
        return sum(reports, start=EvaluationReport(0, 0, 0, 0.0))

    def _finite(self, name: str, output: BodyOutput) -> BodyOutput:
        """The same. Raises ``NotFinite``: a loss of it would be none, and its device would be blamed."""
        if not output.rows_ND.isfinite().all():
            raise NotFinite("the output of the body", f"edge '{self.name}', scoring '{name}'", math.nan)
        return output

    def _lengths(self) -> LengthsOfDevices:
        """How long the examples of all devices are that can be had."""
        failed: dict[str, GaisnetError] = self._device_pool.ensure_ready(self._names)
        asked = {name: LengthsRequest() for name in self._names if name not in failed}
        outcomes = self._device_pool.ask_devices(asked, Lengths, self._config.faults.round_deadline_s)
        failed |= {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, GaisnetError)}
        for name, reason in failed.items():
            _log.warning("edge '%s' does not know how long the examples of %s are: %s", self.name, name, reason)
        return LengthsOfDevices.of({name: each for name, each in outcomes.items() if isinstance(each, Lengths)})

    def _had(self, names: Sequence[str], split: Split) -> dict[str, GaisnetError]:
        """See that activations are here; says whose are not, and why."""
        failed = self._device_pool.ensure_ready(names)
        return failed | self._smashed.fetch_activations([name for name in names if name not in failed], split)

    def _domain_output(self, name: str, split: Scored) -> BodyOutput:
        return self._output(self._smashed.get_inputs(self._model(), name, split), split)

    def _guest_output(self, name: str) -> BodyOutput:
        """While the model is another domain's; nothing of it is kept."""
        domain = self._model()
        inputs = Activations.from_smashed(self._smashed.get_smashed(name, "test"), *domain.placement())
        return self._output(domain.run_prefix(inputs), "test")

    def _output(self, inputs: Activations, split: Scored) -> BodyOutput:
        rows_ND = self._model().compute_output_rows(inputs)
        return BodyOutput(split, 0, sum(inputs.num_labels), torch.arange(len(inputs), dtype=torch.int32), rows_ND)

    def _foundation_output(self, name: str, order: Evaluate) -> BodyOutput:
        self._send_up(name, order.split)
        return self._ask_cloud(BodyRequest(name, order.adapter, order.split), BodyOutput)

    def _send_up(self, name: str, split: Split) -> None:
        """Smashed data goes to the cloud, once in its life."""
        incarnation = self._cloud.peer
        if self._cloud_has.get((name, split)) != incarnation:
            self._ask_cloud(self._smashed.get_smashed(name, split), Done)
            self._cloud_has[name, split] = incarnation

    def _check_report(self, name: str, report: EvaluationReport, split: Split) -> None:
        """A device counts its own examples; how many there are, the edge knows."""
        num_labels = self._smashed.get_smashed(name, split).num_labels_E
        found, expected = (report.num_examples, report.num_tokens), (len(num_labels), int(num_labels.sum()))
        if found != expected:
            raise OutOfBounds(f"device '{name}'", "a report on (examples, tokens)", str(found), str(expected))
        bounds.check_report(f"device '{name}'", report)

    # -- the last mile -------------------------------------------------------------------------------------------------

    def _share(self) -> Shared:
        """Activations of training examples go up, where the device's settings let them; of those that can be had."""
        failed = self._had(self._settings.travelling, "train")
        for name in self._settings.travelling:
            try:
                if name not in failed:
                    self._send_up(name, "train")
            except LinkError as error:
                failed[name] = error
        for name, reason in failed.items():
            _log.warning("edge '%s' shares nothing of %s with the cloud: %s", self.name, name, reason)
        return Shared(tuple(name for name in self._settings.travelling if name not in failed))

    def _ask_owner(self, request: LabelRequest) -> BodyOutputGrad:
        """The device's gradient, for the cloud. Raises why there is none."""
        owner = request.owner
        if owner not in self._settings.travelling:
            raise UnexpectedMessage(f"edge '{self.name}'", f"LabelRequest for '{owner}', whose activations stay here")
        outcome = self._device_pool.ask_devices(
            {owner: request.to_owner()}, BodyOutputGrad, self._config.faults.step_deadline_s
        )[owner]
        if isinstance(outcome, GaisnetError):
            raise outcome
        return outcome

    # -- the cloud -----------------------------------------------------------------------------------------------------

    def _report_traffic(self) -> TrafficReport:
        if self._holding:
            self._holding.save_progress(self._shelf, self._ledger)  # a later life must not report less
        devices, cloud = self._ledger.traffic("device_edge"), self._ledger.traffic("edge_cloud")
        return TrafficReport(devices.bytes_up, devices.bytes_down, cloud.bytes_up, cloud.bytes_down)

    def _ask_cloud(self, message: Message, answer: type[M]) -> M:
        asked = f"edge '{self.name}', waiting for a {answer.__name__} of the cloud"
        deadline_s = self._config.faults.edge_deadline_s
        reply = wait(self._cloud, self._cloud.send(message), asked, deadline_s, deadline_s)
        if not isinstance(reply, answer):
            raise UnexpectedMessage(f"edge '{self.name}', waiting for a {answer.__name__},", type(reply).__name__)
        return reply
