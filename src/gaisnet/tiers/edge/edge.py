"""An edge: serves one domain, holds its domain model (DM) and trains it with its devices."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from gaisnet.checkpoint import CheckpointStore, NullStore
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
from gaisnet.transport.base import Link, wait_for
from gaisnet.transport.ledger import Ledger

M = TypeVar("M", bound=Message)
_log = logging.getLogger(__name__)


class Edge:
    """An edge that answers the cloud and asks its devices.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        cloud: Link to the cloud, which has the foundation model.
        devices: Links to its devices, by name.
        ledger: Counts its requests and their replies.
        store: Keeps its state across restarts; None to keep nothing.
        progress: Told about training.
        publisher: Serves the domain model and its adapters; None for no service.

    Raises:
        CheckpointError: The state on the store cannot be read.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        config: Config,
        cloud: Link,
        devices: Mapping[str, Link],
        ledger: Ledger,
        store: CheckpointStore | None = None,
        progress: Progress = silent,
        publisher: Publisher | None = None,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._cloud = cloud
        self._ledger = ledger
        self._store: CheckpointStore = store or NullStore()
        self._publisher: Publisher = publisher or NoPublisher()
        self._device_pool = DevicePool(f"edge '{settings.name}'", devices, config.faults, self._setup_messages)
        self._devices = {device.name: device for device in settings.devices}
        self._names = list(self._devices)
        self._local = [device.name for device in settings.devices if device.mode == "local"]
        self._activations = ActivationStore(
            settings, config.faults, self._device_pool, config.service.max_activations_mib, self._granted_examples
        )
        self._learning = HybridLearning(settings, config, self._device_pool, self._activations, progress)
        self._cloud_has: dict[tuple[str, Split], str] = {}  # incarnations of the cloud that have smashed data
        self._num_classes = len(settings.labels)
        self._state = load_state(self._store, config, ledger, self._publisher.compute_lock, self._num_classes)
        if self._state:
            self._store.clear_arrivals()
            self._reset_activations(self._state)
            self._publish_model()

    def handle(self, message: Message) -> Message:
        """Answer the cloud. Raises ``UnexpectedMessage``, or the error that makes the request fail."""
        match message:
            case Install():
                return self._install(message)
            case AdapterRelease():
                return self._install_adapter(message)
            case FineTune():
                return self._fine_tune(message)
            case Evaluate(body="domain", split="validate" | "test"):
                return self._evaluate(lambda name: self._domain_output(name, message.split), message.split)
            case Evaluate(body="foundation", split="validate" | "test"):
                return self._evaluate(lambda name: self._foundation_output(name, message), message.split)
            case EvaluateGuest():
                with self._domain().guest_adapters(message.relay, message.domain):
                    return self._evaluate(self._guest_output, "test")
            case LengthsRequest():
                return self._collect_lengths()
            case ShareRequest():
                return self._share_activations()
            case LabelRequest():
                return self._request_gradient(message)
            case TrafficRequest():
                return self._report_traffic()
            case _:
                raise UnexpectedMessage(f"edge '{self.name}'", type(message).__name__)

    def _granted_examples(self, split: Split) -> int:
        """Return how many examples any device may have: in a built-in domain, the size of the whole split."""
        if not self._config.deals(self._settings):
            return 0
        return self._config.data.test_examples if split == "test" else self._config.data.train_examples

    def _reset_activations(self, state: EdgeState) -> None:
        """Forget the activations of another run."""
        self._activations.reset_for_run(state.hidden_size, state.layout.family.is_encoder, state.max_positions)

    # -- model and adapters --------------------------------------------------------------------------------------------

    def _install(self, request: Install) -> Installed:
        """Install the run's model, requesting only the parts that are missing."""
        state = self._state
        if state is None or state.run != request.run or state.digest != request.model:
            same_model = state is not None and state.digest == request.model
            release = state.release if state and same_model else self._ask_cloud(ModelRequest(), ModelRelease)
            anchor = self._ask_cloud(AnchorRequest(), AnchorRelease)
            compute_lock, num_classes = self._publisher.compute_lock, self._num_classes
            state = EdgeState(self._config, request.run, request.model, release, anchor, compute_lock, num_classes)
            state.save_model(self._store)
            self._store.clear_arrivals()
            self._state = state  # only now: after a failure to save it, the next request begins anew
            self._reset_activations(state)
            self._cloud_has.clear()
            self._device_pool.mark_unequipped()
            self._publish_model()
        versions = self._domain().versions
        return Installed(versions["relay"], versions["domain"])

    def _install_adapter(self, release: AdapterRelease) -> Done:
        state = self._require_state()
        bounds.check_integer("the cloud", "the version of an adapter", release.version)
        state.install_adapter(release)
        if release.role == "relay":
            self._activations.clear_prefixes()
        state.save_progress(self._store, self._ledger)
        self._publish_adapter(release.role, release.version)
        self._device_pool.notify_devices(self._local, release)
        return Done()

    def equip_device(self, name: str) -> None:
        """Send a device its part of the model if it lacks it. Raises the error of a device that is not available."""
        for error in self._device_pool.ensure_ready([name]).values():
            raise error

    def _publish_model(self) -> None:
        """Publish a new model and its adapters, if it generates text."""
        domain = self._domain()
        if domain.generates_text:
            self._publisher.publish_body(domain.own_body, domain.layers)
        for role in domain.served_adapters():
            self._publish_adapter(role, domain.versions[role])

    def _publish_adapter(self, role: Role, version: int) -> None:
        """Publish the current tensors of an adapter as this version."""
        if self._domain().generates_text:
            self._publisher.publish_adapter(role, version, *self._domain().served_adapters()[role])

    def _setup_messages(self, name: str) -> Sequence[Message]:
        """Return a device's kit: the messages that it needs before its first request."""
        state, settings = self._require_state(), self._devices[name]
        release = state.release_for(settings)
        if settings.mode == "split":
            return [release]
        adapters = [adapter for adapter in (state.relay, state.local_start) if adapter is not None]
        return [release, state.anchor, *adapters]

    def _require_state(self) -> EdgeState:
        if self._state is None:
            raise UnexpectedMessage(f"edge '{self.name}', which has no model yet,", "request for its domain model")
        return self._state

    def _domain(self) -> DomainModel:
        return self._require_state().domain

    # -- training ------------------------------------------------------------------------------------------------------

    def _fine_tune(self, request: FineTune) -> AdapterUpdate:
        """Run the edge rounds of a cycle.

        An interrupted cycle continues after its last finished round; a finished cycle is not repeated.
        """
        state, domain = self._require_state(), self._domain()
        bounds.check_fine_tune_request("the cloud", request, self._config.fine_tune)
        if state.rounds is None or state.rounds.cycle != request.cycle:
            state.rounds = RoundProgress(request.cycle, domain.versions["domain"])
        while state.rounds.done < self._config.fine_tune.edge_rounds:
            state.rounds = self._learning.run_edge_round(state, state.rounds)
            if state.rounds.done == self._config.fine_tune.edge_rounds:
                domain.versions["domain"] = request.cycle + 1
            self._publish_adapter("domain", request.cycle + 1)
            state.save_progress(self._store, self._ledger)
        rounds = state.rounds
        return AdapterUpdate(
            version=request.cycle + 1,
            base=rounds.base,
            num_examples=rounds.num_examples,
            num_steps=rounds.num_steps,
            loss=rounds.loss,
            faults=rounds.faults,
            tensors=domain.copy_adapter("domain"),
        )

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _evaluate(self, output_of: Callable[[str], BodyOutput], split: Scored) -> EvaluationReport:
        """Sum the reports of all available devices. Raises the first error if no device reports."""
        failed, outputs = self._ensure_activations(self._names, split), dict[str, BodyOutput]()
        for name in (name for name in self._names if name not in failed):
            try:
                outputs[name] = self._check_finite(name, output_of(name))
            except (LinkError, NotFinite) as error:  # the others may succeed
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

    def _check_finite(self, name: str, output: BodyOutput) -> BodyOutput:
        """Return the output. Raises ``NotFinite``: the device would be blamed for a loss that is not finite."""
        if not output.rows_ND.isfinite().all():
            raise NotFinite("the output of the body", f"edge '{self.name}', scoring '{name}'", math.nan)
        return output

    def _collect_lengths(self) -> LengthsOfDevices:
        """Collect the lengths of the examples of all available devices."""
        failed: dict[str, GaisnetError] = self._device_pool.ensure_ready(self._names)
        asked = {name: LengthsRequest() for name in self._names if name not in failed}
        outcomes = self._device_pool.ask_devices(asked, Lengths, self._config.faults.round_deadline_s)
        failed |= {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, GaisnetError)}
        for name, reason in failed.items():
            _log.warning("edge '%s' does not know how long the examples of %s are: %s", self.name, name, reason)
        return LengthsOfDevices.from_devices(
            {name: each for name, each in outcomes.items() if isinstance(each, Lengths)}
        )

    def _ensure_activations(self, names: Sequence[str], split: Split) -> dict[str, GaisnetError]:
        """Fetch missing activations. Return the errors of devices that failed."""
        failed = self._device_pool.ensure_ready(names)
        return failed | self._activations.fetch_activations([name for name in names if name not in failed], split)

    def _domain_output(self, name: str, split: Scored) -> BodyOutput:
        return self._output(self._activations.get_inputs(self._domain(), name, split), split)

    def _guest_output(self, name: str) -> BodyOutput:
        """Run the model with a guest's adapters, keeping nothing."""
        domain = self._domain()
        inputs = Activations.from_smashed(self._activations.get_smashed(name, "test"), *domain.placement())
        return self._output(domain.run_prefix(inputs), "test")

    def _output(self, inputs: Activations, split: Scored) -> BodyOutput:
        rows_ND = self._domain().compute_output_rows(inputs)
        return BodyOutput(split, 0, sum(inputs.num_labels), torch.arange(len(inputs), dtype=torch.int32), rows_ND)

    def _foundation_output(self, name: str, request: Evaluate) -> BodyOutput:
        self._send_up(name, request.split)
        return self._ask_cloud(BodyRequest(name, request.adapter, request.split), BodyOutput)

    def _send_up(self, name: str, split: Split) -> None:
        """Send smashed data to the cloud, once per incarnation of the cloud."""
        incarnation = self._cloud.peer
        if self._cloud_has.get((name, split)) != incarnation:
            self._ask_cloud(self._activations.get_smashed(name, split), Done)
            self._cloud_has[name, split] = incarnation

    def _check_report(self, name: str, report: EvaluationReport, split: Split) -> None:
        """Raise ``OutOfBounds`` where a device's counts differ from those of its activations."""
        num_labels = self._activations.get_smashed(name, split).num_labels_E
        found, expected = (report.num_examples, report.num_tokens), (len(num_labels), int(num_labels.sum()))
        if found != expected:
            raise OutOfBounds(f"device '{name}'", "a report on (examples, tokens)", str(found), str(expected))
        bounds.check_report(f"device '{name}'", report)

    # -- the last mile -------------------------------------------------------------------------------------------------

    def _share_activations(self) -> Shared:
        """Send training activations to the cloud where a device's settings allow it and the device is available."""
        failed = self._ensure_activations(self._settings.travelling, "train")
        for name in self._settings.travelling:
            try:
                if name not in failed:
                    self._send_up(name, "train")
            except LinkError as error:
                failed[name] = error
        for name, reason in failed.items():
            _log.warning("edge '%s' shares nothing of %s with the cloud: %s", self.name, name, reason)
        return Shared(tuple(name for name in self._settings.travelling if name not in failed))

    def _request_gradient(self, request: LabelRequest) -> BodyOutputGrad:
        """Return the gradient of a device for the cloud. Raises the error of the device."""
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
        if self._state:
            self._state.save_progress(self._store, self._ledger)  # after a restart it must not report less
        devices, cloud = self._ledger.traffic("device_edge"), self._ledger.traffic("edge_cloud")
        return TrafficReport(devices.bytes_up, devices.bytes_down, cloud.bytes_up, cloud.bytes_down)

    def _ask_cloud(self, message: Message, reply_type: type[M]) -> M:
        deadline_s, asker = self._config.faults.edge_deadline_s, f"edge '{self.name}'"
        sent = self._cloud.send(message)
        return wait_for(self._cloud, sent, reply_type, asker, "the cloud", deadline_s, deadline_s)
