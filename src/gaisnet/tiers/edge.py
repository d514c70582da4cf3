"""An edge: serves one domain, holds its domain model (DM), drives its devices in hybrid federated split learning."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from gaisnet.adapters.state import AdapterTensors, check_same_shapes
from gaisnet.checkpoint import NoShelf, Shelf
from gaisnet.config import Config, EdgeSettings
from gaisnet.errors import GaisnetError, StaleAdapter, TooFewDevices, UnexpectedMessage, WireFormatError
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
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Message,
    ModelRelease,
    ModelRequest,
    SmashedData,
    SmashRequest,
    Split,
    TrafficReport,
    TrafficRequest,
)
from gaisnet.models.release import restrict
from gaisnet.progress import Progress, silent
from gaisnet.relay.fedavg import fedavg
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.cluster import Asked, Cluster
from gaisnet.tiers.domain_model import DomainModel, Learned, Member, Outcome
from gaisnet.tiers.holding import Holding, Rounds, recall
from gaisnet.tiers.layout import Layout
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
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._cloud = cloud
        self._ledger = ledger
        self._shelf: Shelf = shelf or NoShelf()
        self._progress = progress
        self._cluster = Cluster(f"edge '{settings.name}'", devices, config.faults, self._kit)
        self._names = [device.name for device in settings.devices]
        self._local = [device.name for device in settings.devices if device.mode == "local"]
        self._smashed: dict[tuple[str, Split], SmashedData] = {}
        self._prefixed: dict[tuple[str, Split], Activations] = {}
        self._cloud_has: dict[str, str] = {}  # by device, the life of the cloud that has its held-out examples
        self._holding = recall(self._shelf, config, ledger)
        self._start = self._domain_release() if self._holding else None

    def handle(self, message: Message) -> Message:
        """Answer the cloud. Raises ``UnexpectedMessage``, or what makes the order impossible."""
        match message:
            case Install():
                return self._install(message)
            case AdapterRelease():
                return self._take(message)
            case FineTune():
                return self._fine_tune(message)
            case Evaluate(body="domain"):
                return self._evaluate(self._domain_outputs)
            case Evaluate(body="foundation"):
                return self._evaluate(lambda devices: self._foundation_outputs(devices, message.adapter))
            case TrafficRequest():
                return self._report_traffic()
            case _:
                raise UnexpectedMessage(f"edge '{self.name}'", type(message).__name__)

    # -- what it holds -------------------------------------------------------------------------------------------------

    def _install(self, order: Install) -> Installed:
        """Have the run's model; what is there already is not asked for again."""
        held = self._holding
        if held is None or held.run != order.run or held.digest != order.model:
            same_model = held is not None and held.digest == order.model
            release = held.release if held and same_model else self._ask_cloud(ModelRequest(), ModelRelease)
            anchor = self._ask_cloud(AnchorRequest(), AnchorRelease)
            self._holding = Holding(self._config, order.run, order.model, release, anchor)
            self._holding.keep_model(self._shelf)
            self._smashed.clear()
            self._prefixed.clear()
            self._cloud_has.clear()
            self._cluster.forget()
        versions = self._model().versions
        return Installed(versions["relay"], versions["domain"])

    def _take(self, release: AdapterRelease) -> Done:
        held = self._held()
        held.take(release)
        if release.role == "relay":
            self._prefixed.clear()
        self._start = self._domain_release()
        held.keep_progress(self._shelf, self._ledger)
        self._cluster.tell(self._local, release)
        return Done()

    def _kit(self, name: str) -> Sequence[Message]:
        """What a device must be sent before it can work."""
        held = self._held()
        settings = next(device for device in self._settings.devices if device.name == name)
        layout = Layout(self._config, held.num_layers)
        if settings.mode == "split":
            tail = range(layout.tail_start, layout.num_layers)
            return [restrict(held.release, (*range(settings.head_layers), *tail))]
        adapters = [release for release in (held.relay, self._start) if release is not None]
        return [held.release, held.anchor, *adapters]

    def _domain_release(self) -> AdapterRelease:
        domain = self._model()
        return AdapterRelease("domain", domain.versions["domain"], domain.domain_adapter())

    def _held(self) -> Holding:
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
        if held.rounds is None or held.rounds.cycle != order.cycle:
            held.rounds = Rounds(order.cycle, domain.versions["domain"])
        while held.rounds.done < self._config.fine_tune.edge_rounds:
            self._start = AdapterRelease("domain", held.rounds.base, domain.domain_adapter())
            held.rounds = self._edge_round(held.rounds, self._start)
            if held.rounds.done == self._config.fine_tune.edge_rounds:
                domain.versions["domain"] = order.cycle + 1
            held.keep_progress(self._shelf, self._ledger)
        rounds = held.rounds
        return AdapterUpdate(
            version=order.cycle + 1,
            base=rounds.base,
            num_examples=rounds.num_examples,
            num_steps=rounds.num_steps,
            loss=rounds.loss,
            faults=rounds.faults,
            tensors=domain.domain_adapter(),
        )

    def _edge_round(self, rounds: Rounds, start: AdapterRelease) -> Rounds:
        """One round with whoever can be had. Raises ``TooFewDevices``, or why the only ones failed."""
        failed = self._cluster.gather(self._names)
        alone = self._begin_alone([name for name in self._local if name not in failed], rounds, start, failed)
        parts = self._learn_split(rounds, failed)
        parts = self._finish_alone(alone, start, failed) + parts
        took_part = [name for name in self._names if name not in failed]
        if len(took_part) < self._config.faults.min_devices:
            self._model().put_domain_adapter(start.tensors)
            if not took_part:
                raise next(iter(failed.values()))
            reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise TooFewDevices(self.name, self._config.faults.min_devices, len(took_part), reasons)
        self._model().put_domain_adapter(fedavg([(tensors, learned.num_examples) for learned, tensors in parts]))
        num_examples = sum(learned.num_examples for learned, _ in parts)
        where = f"cycle {rounds.cycle}, edge round {rounds.done}"
        return replace(
            rounds,
            done=rounds.done + 1,
            num_steps=rounds.num_steps + sum(learned.num_steps for learned, _ in parts),
            num_examples=num_examples,
            loss=sum(learned.loss * learned.num_examples for learned, _ in parts) / num_examples,
            faults=(*rounds.faults, *(f"{where}: without {name}: {error}" for name, error in failed.items())),
        )

    def _learn_split(self, rounds: Rounds, failed: dict[str, GaisnetError]) -> list[tuple[Learned, AdapterTensors]]:
        """The split cohort learns in this process; those that fail are added to ``failed``."""
        names = [name for name in self._names if name not in self._local and name not in failed]
        failed |= self._fetch_smashed(names, "train")
        members = [Member(name, self._suffix_input(name, "train")) for name in names if name not in failed]
        if not members:
            return []
        domain, cycle, edge_round = self._model(), rounds.cycle, rounds.done
        where = f"edge '{self.name}', cycle {cycle}, edge round {edge_round}"
        seed = self._config.seed_for("fine_tune", self.name, cycle, edge_round)
        learned = domain.learn(members, self._labels, self._config.fine_tune, seed, where, self._progress)
        failed |= learned.left
        return [(learned, domain.domain_adapter())] if learned.num_examples else []

    def _labels(self, outputs: Mapping[str, BodyOutput]) -> Mapping[str, Outcome]:
        return self._cluster.ask(outputs, BodyOutputGrad, self._config.faults.step_deadline_s)

    def _begin_alone(
        self, names: Sequence[str], rounds: Rounds, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> Asked:
        failed |= self._cluster.tell(names, start)
        order = FineTune(rounds.cycle, rounds.done)
        return self._cluster.start({name: order for name in names if name not in failed})

    def _finish_alone(
        self, asked: Asked, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> list[tuple[Learned, AdapterTensors]]:
        """What local devices learned; an update that does not fit is refused."""
        parts = []
        outcomes = self._cluster.collect(asked, AdapterUpdate, self._config.faults.round_deadline_s)
        for name, update in outcomes.items():
            try:
                if isinstance(update, GaisnetError):
                    raise update
                _check_update(name, start, update)
            except GaisnetError as error:
                failed[name] = error
            else:
                parts.append((Learned(update.num_examples, update.num_steps, update.loss), update.tensors))
        return parts

    # -- scoring -------------------------------------------------------------------------------------------------------

    def _evaluate(self, outputs_for: Callable[[Sequence[str]], dict[str, BodyOutput]]) -> EvaluationReport:
        """Counts and sums of all devices that can be had. Raises what the last one failed with if there is none."""
        failed = self._cluster.gather(self._names)
        failed |= self._fetch_smashed([name for name in self._names if name not in failed], "test")
        outputs = outputs_for([name for name in self._names if name not in failed])
        outcomes = self._cluster.ask(outputs, EvaluationReport, self._config.faults.round_deadline_s)
        reports = [report for report in outcomes.values() if isinstance(report, EvaluationReport)]
        failed |= {name: error for name, error in outcomes.items() if isinstance(error, GaisnetError)}
        for name, error in failed.items():
            _log.warning("edge '%s' scores without %s: %s", self.name, name, error)
        if not reports:
            raise next(iter(failed.values()))
        return sum(reports, start=EvaluationReport(0, 0, 0, 0.0))

    def _domain_outputs(self, devices: Sequence[str]) -> dict[str, BodyOutput]:
        return {name: self._domain_output(self._suffix_input(name, "test")) for name in devices}

    def _domain_output(self, inputs: Activations) -> BodyOutput:
        rows_ND = self._model().output_rows(inputs)
        return BodyOutput("test", 0, sum(inputs.num_labels), torch.arange(len(inputs), dtype=torch.int32), rows_ND)

    def _foundation_outputs(self, devices: Sequence[str], adapter: str | None) -> dict[str, BodyOutput]:
        for name in devices:
            life = self._cloud.peer
            if self._cloud_has.get(name) != life:
                self._ask_cloud(self._smashed[name, "test"], Done)
                self._cloud_has[name] = life
        return {name: self._ask_cloud(BodyRequest(name, adapter), BodyOutput) for name in devices}

    # -- activations ---------------------------------------------------------------------------------------------------

    def _fetch_smashed(self, names: Iterable[str], split: Split) -> dict[str, GaisnetError]:
        """The heads' output is asked for once per run and kept; says who failed, and why."""
        missing = {name: SmashRequest(split) for name in names if (name, split) not in self._smashed}
        failed: dict[str, GaisnetError] = {}
        for name, smashed in self._cluster.ask(missing, SmashedData, self._config.faults.round_deadline_s).items():
            try:
                if isinstance(smashed, GaisnetError):
                    raise smashed
                self._check_smashed(name, split, smashed)
            except GaisnetError as error:
                failed[name] = error
            else:
                self._smashed[name, split] = smashed
        return failed

    def _check_smashed(self, name: str, split: Split, smashed: SmashedData) -> None:
        """What a device says of its own rows is held against the configuration."""
        settings = next(device for device in self._settings.devices if device.name == name)
        found = (smashed.owner, smashed.split, smashed.next_layer, smashed.hidden_ND.shape[1])
        expected = (name, split, settings.head_layers, self._held().hidden_size)
        if found != expected or not torch.isfinite(smashed.hidden_ND).all():
            raise WireFormatError(f"smashed data (owner, split, next layer, width) {found} where {expected} belongs")

    def _suffix_input(self, device: str, split: Split) -> Activations:
        """The frozen prefix is computed once per relay and kept."""
        if (device, split) not in self._prefixed:
            smashed = Activations.of(self._smashed[device, split], *self._model().placement())
            self._prefixed[device, split] = self._model().prefix(smashed)
        return self._prefixed[device, split]

    # -- the cloud -----------------------------------------------------------------------------------------------------

    def _report_traffic(self) -> TrafficReport:
        if self._holding:
            self._holding.keep_progress(self._shelf, self._ledger)  # a later life must not report less
        devices, cloud = self._ledger.traffic("device_edge"), self._ledger.traffic("edge_cloud")
        return TrafficReport(devices.bytes_up, devices.bytes_down, cloud.bytes_up, cloud.bytes_down)

    def _ask_cloud(self, message: Message, answer: type[M]) -> M:
        asked = f"edge '{self.name}', waiting for a {answer.__name__} of the cloud"
        deadline_s = self._config.faults.edge_deadline_s
        reply = wait(self._cloud, self._cloud.send(message), asked, deadline_s, deadline_s)
        if not isinstance(reply, answer):
            raise UnexpectedMessage(f"edge '{self.name}', waiting for a {answer.__name__},", type(reply).__name__)
        return reply


def _check_update(name: str, start: AdapterRelease, update: AdapterUpdate) -> None:
    """What a local device says that it learned is held against what it was given."""
    check_same_shapes(f"of device '{name}'", start.tensors, update.tensors)
    if update.base != start.version:
        raise StaleAdapter(f"of device '{name}'", start.version, update.base)
    if update.num_examples < 1 or not math.isfinite(update.loss):
        raise WireFormatError(
            f"an update of device '{name}' out of {update.num_examples} examples with a loss of {update.loss}"
        )
