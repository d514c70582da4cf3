"""Edge rounds of hybrid federated split learning: with whoever can be had, averaged by examples.

The split cohort learns at the edge, its labels at the devices; local devices learn the whole domain model (DM) by
themselves. Meanwhile: then federated averaging makes one adapter of all (GaisNet, arXiv 2401.02668, section IV). Or
after it, as split learning hands a model on from client to client (Gupta and Raskar, arXiv 1810.06060): then one of
theirs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config, EdgeSettings
from gaisnet.errors import GaisnetError, TooFewDevices
from gaisnet.learning.fedavg import average_products, fedavg
from gaisnet.messages import AdapterRelease, AdapterUpdate, BodyOutput, BodyOutputGrad, FineTune
from gaisnet.progress import Progress
from gaisnet.tiers.edge.activation_store import ActivationStore
from gaisnet.tiers.edge.device_pool import DevicePool, PoolRequest
from gaisnet.tiers.edge.state import RoundProgress
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, Outcome
from gaisnet.tiers.split.trainable_body import TrainingResult

Part = tuple[TrainingResult, AdapterTensors]


class HybridLearning:
    """What an edge and its devices do in a round.

    Args:
        settings: The edge's own entry of the configuration.
        config: The run's configuration.
        cluster: The devices.
        smashed: Their activations.
        progress: Told after every step.

    Attributes:
        start: What a local device begins with when it learns next; a part of its kit.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        config: Config,
        device_pool: DevicePool,
        smashed: ActivationStore,
        progress: Progress,
    ) -> None:
        self._edge = settings.name
        self._config = config
        self._in_sequence = config.fine_tune.local_devices == "sequential"
        self._device_pool = device_pool
        self._smashed = smashed
        self._progress = progress
        self.start: AdapterRelease | None = None
        self._local = [device.name for device in settings.devices if device.mode == "local"]
        self._split = [device.name for device in settings.devices if device.mode == "split"]
        self._built_in = config.deals(settings)

    def run_edge_round(self, domain: DomainModel, rounds: RoundProgress) -> RoundProgress:
        """One round with whoever can be had. Raises ``TooFewDevices``, or why the only ones failed."""
        start = self.start = AdapterRelease("domain", rounds.base, domain.copy_adapter("domain"))
        names = [*self._local, *self._split]
        failed = self._device_pool.ensure_ready(names)
        split, alone = self._learn(domain, rounds, start, failed)
        took_part = [name for name in names if name not in failed]
        if len(took_part) < self._config.faults.min_devices:
            domain.set_adapter("domain", start.tensors)
            if not took_part:
                raise next(iter(failed.values()))
            reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise TooFewDevices(self._edge, self._config.faults.min_devices, len(took_part), reasons)
        domain.set_adapter("domain", self._averaged(split, alone))
        parts = [*alone, *split]
        num_examples = sum(learned.num_examples for learned, _ in parts)
        where = f"cycle {rounds.cycle}, edge round {rounds.done}"
        return replace(
            rounds,
            done=rounds.done + 1,
            num_steps=rounds.num_steps + sum(learned.num_steps for learned, _ in parts),
            num_examples=num_examples,
            loss=sum(learned.loss * learned.num_examples for learned, _ in parts) / num_examples,
            faults=(*rounds.faults, *(_fault(where, name, error) for name, error in failed.items())),
        )

    def _learn(
        self, domain: DomainModel, rounds: RoundProgress, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> tuple[list[Part], list[Part]]:
        """The split cohort, and local devices beside it or after it; those that fail are added to ``failed``."""
        if self._in_sequence:
            split = self._learn_split(domain, rounds, failed)
            self.start = replace(start, tensors=split[0][1]) if split else start
            asked = self._begin_alone(rounds, self.start, failed)
        else:
            asked = self._begin_alone(rounds, start, failed)
            split = self._learn_split(domain, rounds, failed)
        return split, self._finish_alone(asked, self.start or start, rounds.cycle, failed)

    def _averaged(self, split: Sequence[Part], alone: Sequence[Part]) -> AdapterTensors:
        """Of all; in sequence of local devices, if there are any: what they learned goes on from the cohort's."""
        average = fedavg if self._config.fine_tune.average == "factors" else average_products
        parts = alone if alone and self._in_sequence else [*alone, *split]
        return average([(tensors, learned.num_examples) for learned, tensors in parts])

    def _learn_split(self, domain: DomainModel, rounds: RoundProgress, failed: dict[str, GaisnetError]) -> list[Part]:
        """The split cohort learns in this process; those that fail are added to ``failed``."""
        names = [name for name in self._split if name not in failed]
        failed |= self._smashed.fetch_activations(names, "train")
        members = [
            Member(name, self._smashed.get_inputs(domain, name, "train")) for name in names if name not in failed
        ]
        if not members:
            return []
        schedule = TrainingSchedule.for_edge_round(self._config, "edge", self._edge, rounds.cycle, rounds.done)
        learned = domain.train_adapter(members, self._labels, schedule, self._progress)
        failed |= learned.left
        return [(learned, domain.copy_adapter("domain"))] if learned.num_examples else []

    def _labels(self, outputs: Mapping[str, BodyOutput]) -> Mapping[str, Outcome]:
        return self._device_pool.ask_devices(outputs, BodyOutputGrad, self._config.faults.step_deadline_s)

    def _begin_alone(
        self, rounds: RoundProgress, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> PoolRequest:
        names = [name for name in self._local if name not in failed]
        failed |= self._device_pool.notify_devices(names, start)
        order = FineTune(rounds.cycle, rounds.done)
        return self._device_pool.send_requests({name: order for name in names if name not in failed})

    def _finish_alone(
        self, asked: PoolRequest, start: AdapterRelease, cycle: int, failed: dict[str, GaisnetError]
    ) -> list[Part]:
        """Collect the updates of local devices; one out of bounds is refused, and its sender added to ``failed``."""
        fitting = dict[str, AdapterUpdate]()
        outcomes = self._device_pool.collect_replies(asked, AdapterUpdate, self._config.faults.round_deadline_s)
        for name, update in outcomes.items():
            try:
                if isinstance(update, GaisnetError):
                    raise update
                bounds.check_local_update(name, update, start.version, start.tensors, cycle, self._config.fine_tune)
            except GaisnetError as error:
                failed[name] = error
            else:
                fitting[name] = update
        beyond = self._outnumbering({name: update.num_examples for name, update in fitting.items()})
        failed |= beyond
        return [
            (TrainingResult(update.num_examples, update.num_steps, update.loss), update.tensors)
            for name, update in fitting.items()
            if name not in beyond
        ]

    def _outnumbering(self, local: Mapping[str, int]) -> dict[str, GaisnetError]:
        """Local devices that say they have learned from too many examples, beside what others have."""
        known = {name: self._smashed.count_examples(name, "train") for name in self._split}
        counts = {name: count for name, count in known.items() if count is not None} | dict(local)
        granted = self._config.data.train_examples if self._built_in else 0
        beyond = bounds.find_outnumbering(counts, self._config.faults.max_example_ratio, granted)
        return {name: error for name, error in beyond.items() if name in local}


def _fault(where: str, name: str, error: GaisnetError) -> str:
    """A sentence of bounded length: a device's own error may be of any."""
    return f"{where}: without {name}: {error}"[: bounds.MAX_SENTENCE]
