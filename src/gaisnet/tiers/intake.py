"""The cloud's end of the up flow: adapters are tried, merged, and taken the last mile, as devices and a gate let them.

Nothing of this sees an example. Devices count how many of those that they hold back come out right with an adapter, and
in the last mile they give gradients for rows of their training examples, as in every step of split learning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import Config
from gaisnet.messages import EvaluationReport
from gaisnet.progress import Progress
from gaisnet.relay.upward import Verdict, fell, refused, standing
from gaisnet.tiers.cloud_model import MERGED, CloudModel
from gaisnet.tiers.reach import Reach
from gaisnet.tiers.split_step import Member


class Intake:
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
        self._learning = [edge.domain for edge in config.learning_edges()]
        self._asks = config.absorb.validation_share > 0.0

    def take(self, domain: str, tensors: AdapterTensors, reach: Reach) -> Verdict:
        """Plug a domain's adapter in, unless its devices do worse with it than before, or the gate is against it."""
        said = ""
        if self._asks:
            before = self._reports(domain, self._model.adapter(domain), [domain], reach)[domain]
            after = self._reports(domain, tensors, [domain], reach)[domain]
            said = f"devices say {_right(after)} of what they hold back, {_right(before)} with the one in place"
            if fell(before, after, self._config.absorb.max_fall):
                return refused(domain, said)
        return replace(self._model.let_in(domain, tensors), reported=said)

    def merge(self, reach: Reach) -> Verdict | None:
        """Make one adapter of all in place; of several ways the one that devices say is best. None if there is none."""
        candidates, said = self._model.merges(), ""
        if not candidates:
            return None
        best = next(iter(candidates))
        if len(candidates) > 1:
            found = {method: self._everywhere(tensors, reach) for method, tensors in candidates.items()}
            best = max(found, key=lambda method: standing(found[method].values()))
            said = "devices say, of what they hold back, " + ", ".join(
                f"{_right_of_all(reports)} by {method}" for method, reports in found.items()
            )
        return replace(self._model.let_in(MERGED, candidates[best]), reported=said)

    def last_mile(self, members: Sequence[Member], cycle: int, reach: Reach) -> Verdict:
        """The merged adapter learns on the FM itself; it stays as it was where devices do worse with it after that.

        ``members``: of devices that let their activations travel so far.
        """
        if not members:
            return refused(MERGED, "no device for the last mile could be had")
        before, settings = self._model.adapter(MERGED), self._config.absorb.last_mile
        learns = {"local_epochs": settings.epochs, "learning_rate": settings.learning_rate}
        fine_tune = self._config.fine_tune.model_copy(update=learns).in_cycle(cycle)
        seed, where = self._config.seed_for("last mile", cycle), f"the last mile of cycle {cycle}"
        learned = self._model.learn(members, reach.labels, fine_tune, seed, where, self._note)
        after = self._model.adapter(MERGED)
        self._model.put(MERGED, before)
        without = "".join(f", without {name}: {error}" for name, error in learned.left.items())
        if not learned.num_examples:
            return refused(MERGED, f"the last mile has nobody left{without}")
        made = f" after a last mile of {learned.num_steps} steps on {learned.num_examples} examples{without}"
        said = ""
        if self._asks:
            short, long = self._everywhere(before, reach), self._everywhere(after, reach)
            said = f"devices say {_right_of_all(long)} of what they hold back, {_right_of_all(short)} without it"
            if standing(long.values()) < standing(short.values()):
                return replace(refused(MERGED, said), made=made)
        return replace(self._model.let_in(MERGED, after), made=made, reported=said)

    def _everywhere(self, merged: AdapterTensors, reach: Reach) -> dict[str, EvaluationReport]:
        """What the devices of every domain say of a merged adapter."""
        return self._reports(MERGED, merged, self._learning, reach)

    def _reports(
        self, name: str, tensors: AdapterTensors, domains: Sequence[str], reach: Reach
    ) -> dict[str, EvaluationReport]:
        """What devices say of an adapter in the place of the present one, which is there again after."""
        before = self._model.adapter(name)
        self._model.put(name, tensors)
        try:
            return reach.reports(dict.fromkeys(domains, name))
        finally:
            self._model.put(name, before)

    def _note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._progress("last_mile", done, total, {f"last_mile_{name}": value for name, value in figures.items()})


def _right(report: EvaluationReport) -> str:
    return f"{report.num_correct} right of {report.num_examples}"


def _right_of_all(reports: Mapping[str, EvaluationReport]) -> str:
    return f"{standing(reports.values())[0]:.1%} right"
