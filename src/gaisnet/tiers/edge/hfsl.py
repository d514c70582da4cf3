"""Edge rounds of hybrid federated split learning (HFSL): available devices train, results are averaged by examples.

The split cohort trains at the edge while labels stay on the devices; a local device trains the whole domain model (DM)
on its own. In parallel, federated averaging merges all results into one adapter (GaisNet, arXiv 2401.02668, section
IV). In sequence, local devices continue from the adapter of the cohort, as split learning hands a model on from client
to client (Gupta and Raskar, arXiv 1810.06060), and only their results are averaged.
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
from gaisnet.tiers.edge.state import EdgeState, RoundProgress
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.domain_model import DomainModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, Outcome
from gaisnet.tiers.split.trainable_body import TrainingResult

TrainedAdapter = tuple[TrainingResult, AdapterTensors]


class HybridLearning:
    """The training of an edge and its devices in a round.

    Args:
        settings: The edge's own entry of the configuration.
        config: The run's configuration.
        device_pool: The devices.
        activations: Their activations.
        progress: Told after every step.
    """

    def __init__(
        self,
        settings: EdgeSettings,
        config: Config,
        device_pool: DevicePool,
        activations: ActivationStore,
        progress: Progress,
    ) -> None:
        self._edge = settings.name
        self._config = config
        self._in_sequence = config.fine_tune.local_devices == "sequential"
        self._device_pool = device_pool
        self._activations = activations
        self._progress = progress
        self._local = [device.name for device in settings.devices if device.mode == "local"]
        self._split = [device.name for device in settings.devices if device.mode == "split"]
        self._built_in = config.deals(settings)

    def run_edge_round(self, state: EdgeState, rounds: RoundProgress) -> RoundProgress:
        """Run one round with the available devices.

        Raises ``TooFewDevices``, or the error of a device where none took part; the domain adapter is then unchanged.
        """
        domain = state.domain
        start = state.local_start = AdapterRelease("domain", rounds.base, domain.copy_adapter("domain"))
        names = [*self._local, *self._split]
        failed = self._device_pool.ensure_ready(names)
        split, local = self._train_all(state, rounds, start, failed)
        took_part = [name for name in names if name not in failed]
        if len(took_part) < self._config.faults.min_devices:
            domain.set_adapter("domain", start.tensors)
            if not took_part:
                raise next(iter(failed.values()))
            reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise TooFewDevices(self._edge, self._config.faults.min_devices, len(took_part), reasons)
        domain.set_adapter("domain", self._average(split, local))
        parts = [*local, *split]
        num_examples = sum(result.num_examples for result, _ in parts)
        where = f"cycle {rounds.cycle}, edge round {rounds.done}"
        return replace(
            rounds,
            done=rounds.done + 1,
            num_steps=rounds.num_steps + sum(result.num_steps for result, _ in parts),
            num_examples=num_examples,
            loss=sum(result.loss * result.num_examples for result, _ in parts) / num_examples,
            faults=(*rounds.faults, *(_fault(where, name, error) for name, error in failed.items())),
        )

    def _train_all(
        self, state: EdgeState, rounds: RoundProgress, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> tuple[list[TrainedAdapter], list[TrainedAdapter]]:
        """Train the split cohort, and local devices beside it or after it; failures are added to ``failed``."""
        if self._in_sequence:
            split = self._train_split(state.domain, rounds, failed)
            if split:
                start = state.local_start = replace(start, tensors=split[0][1])
            requests = self._start_local(rounds, start, failed)
        else:
            requests = self._start_local(rounds, start, failed)
            split = self._train_split(state.domain, rounds, failed)
        return split, self._collect_local(requests, start, rounds.cycle, failed)

    def _average(self, split: Sequence[TrainedAdapter], local: Sequence[TrainedAdapter]) -> AdapterTensors:
        """Average all adapters; in sequence only those of local devices, which continue from the cohort's."""
        average = fedavg if self._config.fine_tune.average == "factors" else average_products
        parts = local if local and self._in_sequence else [*local, *split]
        return average([(tensors, result.num_examples) for result, tensors in parts])

    def _train_split(
        self, domain: DomainModel, rounds: RoundProgress, failed: dict[str, GaisnetError]
    ) -> list[TrainedAdapter]:
        """Train the split cohort in this process; failures are added to ``failed``."""
        names = [name for name in self._split if name not in failed]
        failed |= self._activations.fetch_activations(names, "train")
        members = [
            Member(name, self._activations.get_inputs(domain, name, "train")) for name in names if name not in failed
        ]
        if not members:
            return []
        schedule = TrainingSchedule.for_edge_round(self._config, "edge", self._edge, rounds.cycle, rounds.done)
        result = domain.train_adapter(members, self._request_gradients, schedule, self._progress)
        failed |= result.excluded
        return [(result, domain.copy_adapter("domain"))] if result.num_examples else []

    def _request_gradients(self, outputs: Mapping[str, BodyOutput]) -> Mapping[str, Outcome]:
        return self._device_pool.ask_devices(outputs, BodyOutputGrad, self._config.faults.step_deadline_s)

    def _start_local(
        self, rounds: RoundProgress, start: AdapterRelease, failed: dict[str, GaisnetError]
    ) -> PoolRequest:
        names = [name for name in self._local if name not in failed]
        failed |= self._device_pool.notify_devices(names, start)
        request = FineTune(rounds.cycle, rounds.done)
        return self._device_pool.send_requests({name: request for name in names if name not in failed})

    def _collect_local(
        self, requests: PoolRequest, start: AdapterRelease, cycle: int, failed: dict[str, GaisnetError]
    ) -> list[TrainedAdapter]:
        """Collect the updates of local devices; failures and updates out of bounds are added to ``failed``."""
        fitting = dict[str, AdapterUpdate]()
        outcomes = self._device_pool.collect_replies(requests, AdapterUpdate, self._config.faults.round_deadline_s)
        for name, update in outcomes.items():
            try:
                if isinstance(update, GaisnetError):
                    raise update
                bounds.check_local_update(name, update, start.version, start.tensors, cycle, self._config.fine_tune)
            except GaisnetError as error:
                failed[name] = error
            else:
                fitting[name] = update
        beyond = self._find_outnumbering({name: update.num_examples for name, update in fitting.items()})
        failed |= beyond
        return [
            (TrainingResult(update.num_examples, update.num_steps, update.loss), update.tensors)
            for name, update in fitting.items()
            if name not in beyond
        ]

    def _find_outnumbering(self, local: Mapping[str, int]) -> dict[str, GaisnetError]:
        """Return local devices whose example counts are too large compared with those of the others."""
        known = {name: self._activations.count_examples(name, "train") for name in self._split}
        counts = {name: count for name, count in known.items() if count is not None} | dict(local)
        granted = self._config.data.train_examples if self._built_in else 0
        beyond = bounds.find_outnumbering(counts, self._config.faults.max_example_ratio, granted)
        return {name: error for name, error in beyond.items() if name in local}


def _fault(where: str, name: str, error: GaisnetError) -> str:
    """Return a sentence of bounded length, however long the device's own error is."""
    return f"{where}: without {name}: {error}"[: bounds.MAX_SENTENCE]
