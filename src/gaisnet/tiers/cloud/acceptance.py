"""Acceptance of adapters in the cloud: they are tried, merged, and trained the last mile, as gate and devices allow.

The cloud sees no example. Devices count the validation examples that come out right with an adapter in
place, and in the last mile they return gradients for rows of their training examples, as in every step of
split learning. A rejected adapter leaves everything as it was.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config
from gaisnet.learning.gate import Verdict, accuracy_fell, mean_scores, reject, same_examples
from gaisnet.messages import EvaluationReport
from gaisnet.progress import Progress
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.device_client import DeviceClient
from gaisnet.tiers.cloud.model import CloudModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member
from gaisnet.tiers.split.trainable_body import TrainingResult

_OTHER_EXAMPLES = "but of other examples, so nothing follows"
Reports = Mapping[str, EvaluationReport]
"""By domain."""


@dataclass(frozen=True)
class _InPlace:
    """An adapter in place, and its cost in general ability."""

    tensors: AdapterTensors
    retention: float | None  # None if unknown


class AdapterAcceptance:
    """Puts adapters into the foundation model (FM).

    Args:
        model: The FM with its adapters.
        config: The run's configuration.
        progress: Told during the last mile.
    """

    def __init__(self, model: CloudModel, config: Config, progress: Progress) -> None:
        self._model = model
        self._config = config
        self._progress = progress
        self._merged_by_domain = {edge.domain: MERGED for edge in config.learning_edges()}
        self._asks_devices = config.absorb.validation_share > 0.0
        self._merged_reports: Reports | None = None  # on the merged adapter in place, if devices were asked

    def try_adapters(self, adapters: Mapping[str, AdapterTensors], devices: DeviceClient) -> list[Verdict]:
        """Plug in the domain adapters that the gate accepts, and remove those with which devices score worse."""
        own = {domain: domain for domain in adapters}
        before = devices.collect_reports(own) if self._asks_devices and own else {}
        with self._restored_after_error(*adapters) as kept:
            verdicts = {domain: self._model.gate.try_adapter(domain, tensors) for domain, tensors in adapters.items()}
            accepted = {domain: domain for domain, verdict in verdicts.items() if verdict.accepted}
            after = devices.collect_reports(accepted) if self._asks_devices and accepted else {}
            for domain in accepted if self._asks_devices else ():
                verdicts[domain] = self._heed_devices(verdicts[domain], before.get(domain), after.get(domain))
                if not verdicts[domain].accepted:
                    self._put_back(domain, kept[domain])
        return list(verdicts.values())

    def _heed_devices(
        self, verdict: Verdict, before: EvaluationReport | None, after: EvaluationReport | None
    ) -> Verdict:
        """Return the verdict after devices' scores; an edge cannot avoid them by not replying."""
        if before is None or after is None:
            return reject(verdict.adapter, "its devices could not be asked about it")
        feedback = _compared(before, after)
        if accuracy_fell(before, after, self._config.absorb.max_fall):
            return reject(verdict.adapter, feedback)
        return replace(verdict, device_feedback=feedback)

    def merge(self, devices: DeviceClient) -> Verdict | None:
        """Merge all adapters in place; of several ways, keep the one with the best scores. None for an encoder."""
        ways, self._merged_reports = self._model.merger.merge_adapters() if self._model.merger else {}, None
        if len(ways) < 2:
            return next((self._model.gate.try_adapter(MERGED, tensors) for tensors in ways.values()), None)
        verdicts, in_place, reports = dict[str, Verdict](), dict[str, _InPlace](), dict[str, Reports]()
        with self._restored_after_error(MERGED) as kept:
            for way, tensors in ways.items():
                verdicts[way] = self._model.gate.try_adapter(MERGED, tensors)
                if verdicts[way].accepted:
                    in_place[way], reports[way] = (
                        self._in_place(MERGED),
                        devices.collect_reports(self._merged_by_domain),
                    )
                    self._put_back(MERGED, kept[MERGED])
        if not in_place:
            return next(iter(verdicts.values()))
        best = max(reports, key=lambda way: mean_scores(reports[way].values()))
        if not _alike(*reports.values()):
            best = next(iter(reports))
        self._put_back(MERGED, in_place[best])
        self._merged_reports = reports[best]
        found = ", ".join(f"{_mean_accuracy(with_way)} by {way}" for way, with_way in reports.items())
        feedback = f"on their validation examples devices score {found}{_caveat(reports.values())}"
        return replace(verdicts[best], device_feedback=feedback)

    def last_mile(self, members: Sequence[Member], cycle: int, devices: DeviceClient) -> Verdict:
        """Train the merged adapter on the FM itself; undo it if devices score worse afterwards.

        ``members``: devices that allow their activations at the cloud.
        """
        if not members:
            return reject(MERGED, "no device for the last mile could be had")
        without = (
            (self._merged_reports or devices.collect_reports(self._merged_by_domain)) if self._asks_devices else {}
        )
        with self._restored_after_error(MERGED) as kept:
            return self._train_and_try(members, cycle, devices, without, kept[MERGED])

    def _train_and_try(
        self, members: Sequence[Member], cycle: int, devices: DeviceClient, without: Reports, kept: _InPlace
    ) -> Verdict:
        trained = self._train_last_mile(members, cycle, devices)
        tensors = self._model.body.copy_adapter(MERGED)
        self._put_back(MERGED, kept)
        left = "".join(f", without {name}: {error}" for name, error in trained.excluded.items())
        if not trained.num_examples:
            return reject(MERGED, f"the last mile has nobody left{left}")
        origin = f" after a last mile of {trained.num_steps} steps on {trained.num_examples} examples{left}"
        verdict = replace(self._model.gate.try_adapter(MERGED, tensors), origin=origin)
        if not verdict.accepted or not self._asks_devices:
            return verdict
        with_it = devices.collect_reports(self._merged_by_domain)
        feedback = (
            f"devices say {_mean_accuracy(with_it)} of their validation examples, {_mean_accuracy(without)} without it"
        )
        if _alike(without, with_it) and mean_scores(with_it.values()) < mean_scores(without.values()):
            self._put_back(MERGED, kept)
            return replace(reject(MERGED, feedback), origin=origin)
        return replace(verdict, device_feedback=feedback + _caveat([without, with_it]))

    def _train_last_mile(self, members: Sequence[Member], cycle: int, devices: DeviceClient) -> TrainingResult:
        last_mile = self._config.absorb.last_mile
        overrides = {"edge_rounds": 1, "local_epochs": last_mile.epochs, "learning_rate": last_mile.learning_rate}
        settings = self._config.fine_tune.model_copy(update=overrides).in_cycle(cycle)
        schedule = TrainingSchedule(
            settings, self._config.seed_for("last mile", cycle), f"the last mile of cycle {cycle}"
        )
        return self._model.body.train_adapter(members, devices.request_gradients, schedule, self._note)

    @contextmanager
    def _restored_after_error(self, *names: str) -> Iterator[Mapping[str, _InPlace]]:
        """Yield the adapters in place, by name; restore them after an error."""
        kept = {name: self._in_place(name) for name in names}
        try:
            yield kept
        except BaseException:
            for name, before in kept.items():
                self._put_back(name, before)
            raise

    def _in_place(self, name: str) -> _InPlace:
        return _InPlace(self._model.body.copy_adapter(name), self._model.gate.retention.get(name))

    def _put_back(self, name: str, kept: _InPlace) -> None:
        self._model.body.set_adapter(name, kept.tensors)
        if kept.retention is not None:
            self._model.gate.retention[name] = kept.retention

    def _note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._progress("last_mile", done, total, {f"last_mile_{name}": value for name, value in figures.items()})


def _alike(*reports: Reports) -> bool:
    """Return whether all reports cover the same examples."""
    first, *others = reports
    return all(
        first.keys() == other.keys() and all(same_examples(first[domain], other[domain]) for domain in first)
        for other in others
    )


def _caveat(reports: Iterable[Reports]) -> str:
    return "" if _alike(*reports) else f", {_OTHER_EXAMPLES}"


def _compared(before: EvaluationReport, after: EvaluationReport) -> str:
    feedback = f"devices say {after.num_correct} right of {after.num_examples} of their validation examples"
    if not same_examples(before, after):
        return f"{feedback}, {before.num_correct} of {before.num_examples} with the one before, {_OTHER_EXAMPLES}"
    return f"{feedback}, {before.num_correct} with the one before"


def _mean_accuracy(reports: Reports) -> str:
    return f"{mean_scores(reports.values())[0]:.1%} right"
