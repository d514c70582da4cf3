"""The cloud's end of the up flow: adapters are tried, merged, and taken the last mile, as devices and a gate let them.

Nothing of this sees an example. Devices count how many of those that they hold back come out right with an adapter as
it is plugged in, and in the last mile they give gradients for rows of their training examples, as in every step of
split learning. What does not stay leaves everything as it was.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config
from gaisnet.learning.gate import Verdict, comparable, fell, refused, standing
from gaisnet.messages import EvaluationReport
from gaisnet.progress import Progress
from gaisnet.tiers.cloud.device_client import DeviceClient
from gaisnet.tiers.cloud.model import MERGED, CloudModel
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member
from gaisnet.tiers.split.trainable_body import TrainingResult

_OTHERS = "but of other examples, so nothing follows"
Reports = Mapping[str, EvaluationReport]
"""By domain."""


@dataclass(frozen=True)
class _InPlace:
    """An adapter that is plugged in, and what it costs in general ability."""

    tensors: AdapterTensors
    retention: float | None  # None where nobody knows


class AdapterAcceptance:
    """Takes what comes up into the foundation model (FM).

    Args:
        model: The FM with its adapters.
        config: The run's configuration.
        progress: Told while the last mile learns.
    """

    def __init__(self, model: CloudModel, config: Config, progress: Progress) -> None:
        self._model = model
        self._config = config
        self._progress = progress
        self._everywhere = {edge.domain: MERGED for edge in config.learning_edges()}
        self._asks = config.absorb.validation_share > 0.0
        self._of_merged: Reports | None = None  # what devices say of the merged adapter in place, if they were asked

    def take(self, adapters: Mapping[str, AdapterTensors], devices: DeviceClient) -> list[Verdict]:
        """Plug domains' adapters in where the gate lets them, and take those out that their devices do worse with."""
        own = {domain: domain for domain in adapters}
        before = devices.reports(own) if self._asks and own else {}
        with self._or_as_before(*adapters) as kept:
            verdicts = {domain: self._model.try_adapter(domain, tensors) for domain, tensors in adapters.items()}
            taken = {domain: domain for domain, verdict in verdicts.items() if verdict.accepted}
            after = devices.reports(taken) if self._asks and taken else {}
            for domain in taken if self._asks else ():
                verdicts[domain] = self._as_devices_say(verdicts[domain], before.get(domain), after.get(domain))
                if not verdicts[domain].accepted:
                    self._put_back(domain, kept[domain])
        return list(verdicts.values())

    def _as_devices_say(
        self, verdict: Verdict, before: EvaluationReport | None, after: EvaluationReport | None
    ) -> Verdict:
        """The verdict after what devices report; an edge that falls silent when it is asked cannot get around them."""
        if before is None or after is None:
            return refused(verdict.adapter, "its devices could not be asked about it")
        devices_say = _compared(before, after)
        if fell(before, after, self._config.absorb.max_fall):
            return refused(verdict.adapter, devices_say)
        return replace(verdict, reported=devices_say)

    def merge(self, devices: DeviceClient) -> Verdict | None:
        """Make one adapter of all in place; of several ways the one that devices say is best. None if there is none."""
        ways, self._of_merged = self._model.merges(), None
        if len(ways) < 2:
            return next((self._model.try_adapter(MERGED, tensors) for tensors in ways.values()), None)
        verdicts, plugged, reports = dict[str, Verdict](), dict[str, _InPlace](), dict[str, Reports]()
        with self._or_as_before(MERGED) as kept:
            for way, tensors in ways.items():
                verdicts[way] = self._model.try_adapter(MERGED, tensors)
                if verdicts[way].accepted:
                    plugged[way], reports[way] = self._in_place(MERGED), devices.reports(self._everywhere)
                    self._put_back(MERGED, kept[MERGED])
        if not plugged:
            return next(iter(verdicts.values()))
        best = max(reports, key=lambda way: standing(reports[way].values()))
        if not _alike(*reports.values()):
            best = next(iter(reports))
        self._put_back(MERGED, plugged[best])
        self._of_merged = reports[best]
        found = ", ".join(f"{_right_of_all(said)} by {way}" for way, said in reports.items())
        said = f"devices say, of what they hold back, {found}{_unless(reports.values())}"
        return replace(verdicts[best], reported=said)

    def last_mile(self, members: Sequence[Member], cycle: int, devices: DeviceClient) -> Verdict:
        """The merged adapter learns on the FM itself; it stays as it was where devices do worse with it after that.

        ``members``: of devices that let their activations travel so far.
        """
        if not members:
            return refused(MERGED, "no device for the last mile could be had")
        without = (self._of_merged or devices.reports(self._everywhere)) if self._asks else {}
        with self._or_as_before(MERGED) as kept:
            return self._judged(members, cycle, devices, without, kept[MERGED])

    def _judged(
        self, members: Sequence[Member], cycle: int, devices: DeviceClient, without: Reports, kept: _InPlace
    ) -> Verdict:
        learned = self._learned(members, cycle, devices)
        tensors = self._model.adapter(MERGED)
        self._put_back(MERGED, kept)
        left = "".join(f", without {name}: {error}" for name, error in learned.excluded.items())
        if not learned.num_examples:
            return refused(MERGED, f"the last mile has nobody left{left}")
        made = f" after a last mile of {learned.num_steps} steps on {learned.num_examples} examples{left}"
        verdict = replace(self._model.try_adapter(MERGED, tensors), made=made)
        if not verdict.accepted or not self._asks:
            return verdict
        with_it = devices.reports(self._everywhere)
        said = f"devices say {_right_of_all(with_it)} of what they hold back, {_right_of_all(without)} without it"
        if _alike(without, with_it) and standing(with_it.values()) < standing(without.values()):
            self._put_back(MERGED, kept)
            return replace(refused(MERGED, said), made=made)
        return replace(verdict, reported=said + _unless([without, with_it]))

    def _learned(self, members: Sequence[Member], cycle: int, devices: DeviceClient) -> TrainingResult:
        last_mile = self._config.absorb.last_mile
        learns = {"edge_rounds": 1, "local_epochs": last_mile.epochs, "learning_rate": last_mile.learning_rate}
        settings = self._config.fine_tune.model_copy(update=learns).in_cycle(cycle)
        schedule = TrainingSchedule(
            settings, self._config.seed_for("last mile", cycle), f"the last mile of cycle {cycle}"
        )
        return self._model.learn(members, devices.labels, schedule, self._note)

    @contextmanager
    def _or_as_before(self, *names: str) -> Iterator[Mapping[str, _InPlace]]:
        """Inside, adapters may be tried: what is in place now, by name. After an error it is so again."""
        kept = {name: self._in_place(name) for name in names}
        try:
            yield kept
        except BaseException:
            for name, before in kept.items():
                self._put_back(name, before)
            raise

    def _in_place(self, name: str) -> _InPlace:
        return _InPlace(self._model.adapter(name), self._model.retention.get(name))

    def _put_back(self, name: str, kept: _InPlace) -> None:
        self._model.put(name, kept.tensors)
        if kept.retention is not None:
            self._model.retention[name] = kept.retention

    def _note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._progress("last_mile", done, total, {f"last_mile_{name}": value for name, value in figures.items()})


def _alike(*reports: Reports) -> bool:
    """Whether all are of the same examples."""
    first, *others = reports
    return all(
        first.keys() == other.keys() and all(comparable(first[domain], other[domain]) for domain in first)
        for other in others
    )


def _unless(reports: Iterable[Reports]) -> str:
    return "" if _alike(*reports) else f", {_OTHERS}"


def _compared(before: EvaluationReport, after: EvaluationReport) -> str:
    said = f"devices say {after.num_correct} right of {after.num_examples} of what they hold back"
    if not comparable(before, after):
        return f"{said}, {before.num_correct} of {before.num_examples} with the one before, {_OTHERS}"
    return f"{said}, {before.num_correct} with the one before"


def _right_of_all(reports: Reports) -> str:
    return f"{standing(reports.values())[0]:.1%} right"
