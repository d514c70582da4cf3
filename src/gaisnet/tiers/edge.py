"""An edge: serves one domain, holds its domain model (DM), drives its devices in hybrid federated split learning."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config, EdgeSettings
from gaisnet.errors import UnexpectedMessage
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    BodyOutput,
    BodyOutputGrad,
    BodyRequest,
    Done,
    Evaluate,
    EvaluationReport,
    FineTune,
    Message,
    ModelRelease,
    SmashedData,
    SmashRequest,
    Split,
)
from gaisnet.models.release import ReleasedModel, restrict
from gaisnet.progress import Progress, silent
from gaisnet.relay.fedavg import fedavg
from gaisnet.tiers.activations import Activations
from gaisnet.tiers.domain_model import DomainModel, Learned, Member
from gaisnet.tiers.layout import Layout
from gaisnet.transport.base import Link

M = TypeVar("M", bound=Message)


class Edge:
    """Answers the cloud and asks its devices.

    Args:
        settings: Its own entry of the configuration.
        config: The run's configuration.
        cloud: Where the foundation model can be asked.
        devices: Links to its devices, by name.
        progress: Told while it learns.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        config: Config,
        cloud: Link,
        devices: Mapping[str, Link],
        progress: Progress = silent,
    ) -> None:
        self.name = settings.name
        self._settings = settings
        self._config = config
        self._cloud = cloud
        self._devices = devices
        self._progress = progress
        self._domain: DomainModel | None = None
        self._smashed: dict[tuple[str, Split], SmashedData] = {}
        self._prefixed: dict[tuple[str, Split], Activations] = {}
        self._cloud_has: set[str] = set()

    def handle(self, message: Message) -> Message:
        """Answer the cloud. Raises ``UnexpectedMessage``."""
        match message:
            case ModelRelease():
                return self._install(message)
            case AdapterRelease():
                return self._take(message)
            case AnchorRelease():
                self._model().take_anchor(message)
                return self._tell_local_devices(message)
            case FineTune():
                return self._fine_tune(message)
            case Evaluate(body="domain"):
                return self._evaluate(self._domain_output)
            case Evaluate(body="foundation"):
                return self._evaluate(lambda device: self._foundation_output(device, message.adapter))
            case _:
                raise UnexpectedMessage(f"edge '{self.name}'", type(message).__name__)

    def _install(self, release: ModelRelease) -> Done:
        """Build the DM's body and hand each device what it holds."""
        model = ReleasedModel(release)
        layout = Layout(self._config, model.num_layers)
        self._domain = DomainModel(model.body(layout.first_cut, layout.tail_start), layout)
        tail = range(layout.tail_start, layout.num_layers)
        for settings in self._settings.devices:
            holds = release.layers if settings.mode == "local" else (*range(settings.head_layers), *tail)
            self._ask(settings.name, restrict(release, holds), Done)
        return Done()

    def _take(self, release: AdapterRelease) -> Done:
        self._model().take(release)
        if release.role == "relay":
            self._prefixed.clear()
        return self._tell_local_devices(release)

    def _tell_local_devices(self, message: Message) -> Done:
        for name in self._local_devices():
            self._ask(name, message, Done)
        return Done()

    def _fine_tune(self, order: FineTune) -> AdapterUpdate:
        """Edge rounds of HFSL: the split cohort learns here, local devices by themselves; then all are averaged."""
        domain = self._model()
        learned: list[tuple[Learned, AdapterTensors]] = []
        num_steps = 0
        for edge_round in range(self._config.fine_tune.edge_rounds):
            start = domain.domain_adapter()
            learned = [self._learn_alone(name, order.cycle, edge_round, start) for name in self._local_devices()]
            learned += self._learn_split(domain, order.cycle, edge_round)
            num_steps += sum(one.num_steps for one, _ in learned)
            domain.put_domain_adapter(fedavg([(tensors, one.num_examples) for one, tensors in learned]))
        num_examples = sum(one.num_examples for one, _ in learned)
        loss = sum(one.loss * one.num_examples for one, _ in learned) / num_examples
        return AdapterUpdate(domain.versions["domain"], num_examples, num_steps, loss, domain.domain_adapter())

    def _learn_split(self, domain: DomainModel, cycle: int, edge_round: int) -> list[tuple[Learned, AdapterTensors]]:
        names = [s.name for s in self._settings.devices if s.mode == "split"]
        if not names:
            return []
        members = [Member(name, self._suffix_input(name, "train"), self._grad_from(name)) for name in names]
        where = f"edge '{self.name}', cycle {cycle}, edge round {edge_round}"
        seed = self._config.seed_for("fine_tune", self.name, cycle, edge_round)
        learned = domain.learn(members, self._config.fine_tune, seed, where, self._progress)
        return [(learned, domain.domain_adapter())]

    def _learn_alone(
        self, name: str, cycle: int, edge_round: int, start: AdapterTensors
    ) -> tuple[Learned, AdapterTensors]:
        version = self._model().versions["domain"]
        self._ask(name, AdapterRelease("domain", version, start), Done)
        update = self._ask(name, FineTune(cycle, edge_round), AdapterUpdate)
        return Learned(update.num_examples, update.num_steps, update.loss), update.tensors

    def _grad_from(self, name: str) -> Callable[[BodyOutput], BodyOutputGrad]:
        return lambda output: self._ask(name, output, BodyOutputGrad)

    def _evaluate(self, output_for: Callable[[str], BodyOutput]) -> EvaluationReport:
        reports = [self._ask(name, output_for(name), EvaluationReport) for name in self._devices]
        return sum(reports, start=EvaluationReport(0, 0, 0, 0.0))

    def _domain_output(self, device: str) -> BodyOutput:
        inputs = self._suffix_input(device, "test")
        rows_ND = self._model().output_rows(inputs)
        return BodyOutput("test", 0, sum(inputs.num_labels), torch.arange(len(inputs), dtype=torch.int32), rows_ND)

    def _foundation_output(self, device: str, adapter: str | None) -> BodyOutput:
        if device not in self._cloud_has:
            self._expect(self._cloud.request(self._smashed_data(device, "test")), Done)
            self._cloud_has.add(device)
        return self._expect(self._cloud.request(BodyRequest(device, adapter)), BodyOutput)

    def _suffix_input(self, device: str, split: Split) -> Activations:
        """The frozen prefix is computed once per relay and kept."""
        if (device, split) not in self._prefixed:
            smashed = Activations.of(self._smashed_data(device, split), *self._model().placement())
            self._prefixed[device, split] = self._model().prefix(smashed)
        return self._prefixed[device, split]

    def _smashed_data(self, device: str, split: Split) -> SmashedData:
        """The head's output is asked for once per run and kept."""
        if (device, split) not in self._smashed:
            self._smashed[device, split] = self._ask(device, SmashRequest(split), SmashedData)
        return self._smashed[device, split]

    def _local_devices(self) -> list[str]:
        return [settings.name for settings in self._settings.devices if settings.mode == "local"]

    def _ask(self, device: str, message: Message, answer: type[M]) -> M:
        return self._expect(self._devices[device].request(message), answer)

    def _expect(self, message: Message, answer: type[M]) -> M:
        if not isinstance(message, answer):
            raise UnexpectedMessage(f"edge '{self.name}', waiting for a {answer.__name__},", type(message).__name__)
        return message

    def _model(self) -> DomainModel:
        if self._domain is None:
            raise UnexpectedMessage(f"edge '{self.name}', which has no model yet,", "request for its domain model")
        return self._domain
