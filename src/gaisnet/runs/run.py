"""A run: the three verbs over and over, everything measured, everything written as soon as it is known."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor

from gaisnet.adapters.state import save_adapter
from gaisnet.checkpoint import write_text
from gaisnet.config import Config
from gaisnet.config.file import parse_config, with_absolute_paths
from gaisnet.config.overrides import keys_of, with_overrides
from gaisnet.data.devices import DomainData, load_domains, load_public_inputs, majority_share, public_text
from gaisnet.engines.local import build_network
from gaisnet.engines.sizes import check_sizes
from gaisnet.errors import CheckpointError, CheckpointVersion, ConfigError, NothingToResume
from gaisnet.learning.relay import Distillation, TaskTemplate
from gaisnet.messages import EvaluationReport
from gaisnet.models.foundation import Foundation, load_foundation, with_context
from gaisnet.models.pretrained import longest_example
from gaisnet.network import Network, Scores
from gaisnet.progress import Progress, silent
from gaisnet.runs.model_card import CARD_NAME, render_card
from gaisnet.runs.output import RunFolder
from gaisnet.runs.summary import (
    Baselines,
    Cycle,
    DeviceFigures,
    Examples,
    LinkBytes,
    Matrix,
    ModelFigures,
    RelayLoss,
    Retention,
    Score,
    Seconds,
    Summary,
    Traffic,
)
from gaisnet.tiers.split.layout import with_family_defaults
from gaisnet.transport.ledger import Ledger, LinkKind

T = TypeVar("T")
Build = Callable[[Foundation, str, Progress], Network]
"""Makes a network from the foundation model and public text, and reports progress."""
_CHECKPOINT = "run"
_MAY_CHANGE = ("cycles", "evaluate", "faults", "front", "service")  # while a run goes on
_WHERE = r"model\.(foundation|public_inputs|device)|edges\.\d+\.devices\.\d+\.data|adapters\.licence"


def run_experiment(
    config: Config, out: Path, progress: Progress = silent, new_ledger: Callable[[], Ledger] = Ledger
) -> Summary:
    """Carry out a whole run on this machine and write its output folder.

    Raises ``GaisnetError``; finished cycles stay on disk, and ``resume_experiment`` continues after them.
    """
    domains = load_domains(config)
    with RunFolder.create(out) as folder:
        return carry_out(config, folder, progress, local_build(config, domains, new_ledger), majorities(domains))


def resume_experiment(out: Path, overrides: Sequence[str] = (), progress: Progress = silent) -> Summary:
    """Resume the run in ``out`` after its last finished cycle, with the configuration that it was started with.

    ``overrides`` as for ``kept_config``. Raises ``GaisnetError``.
    """
    with RunFolder.resume(out) as folder:
        config = kept_config(folder, overrides)
        domains = load_domains(config)
        return carry_out(config, folder, progress, local_build(config, domains, Ledger), majorities(domains))


def kept_config(folder: RunFolder, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of the run in a folder.

    ``overrides`` as for ``load_config``, of ``cycles``, ``evaluate``, ``faults``, ``front`` and ``service``, and of
    places that may have moved: ``model.foundation``, ``model.public_inputs``, ``model.device``, a device's
    ``data``; and ``adapters.licence``. Raises ``NothingToResume``, ``CheckpointError`` or ``ConfigError``.
    """
    raw = _checkpoint(folder)[0]["summary"]["config"]
    for override, key in zip(overrides, keys_of(overrides), strict=True):
        if key.partition(".")[0] not in _MAY_CHANGE and not re.fullmatch(_WHERE, key):
            do = f"change {', '.join(_MAY_CHANGE)} only, or where things are: model.foundation, model.public_inputs, "
            do += "model.device, edges.N.devices.N.data; or adapters.licence"
            raise ConfigError(f"--set {override} on a run that goes on", "would make it another run", do)
    config = parse_config(with_overrides(raw, overrides), f"the configuration in '{folder.path}'")
    return with_absolute_paths(config, overrides)


def data_key(config: Config, device: str) -> str:
    """Return the dotted key of a device's data folder, for ``--set``."""
    return next(
        f"edges.{i}.devices.{j}.data"
        for i, edge in enumerate(config.edges)
        for j, one in enumerate(edge.devices)
        if one.name == device
    )


def hold_against(folder: RunFolder, baselines: Baselines) -> Summary:
    """Write baselines into a run's summary, report and checkpoint.

    Raises ``NothingToResume``, ``CheckpointError`` or ``OutputNotWritable``.
    """
    state, tensors = _checkpoint(folder)
    summary = Summary.model_validate(state["summary"]).model_copy(update={"baselines": baselines}).with_gaps()
    folder.write_summary(summary)
    folder.write_report(summary)
    folder.store.save(_CHECKPOINT, {**state, "summary": summary.to_json()}, tensors)
    return summary


def kept_summary(folder: RunFolder) -> Summary:
    """Return the summary of the run in a folder, as it would resume. Raises as ``hold_against``."""
    return Summary.model_validate(_checkpoint(folder)[0]["summary"])


def _checkpoint(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kept = folder.store.load(_CHECKPOINT)
    if kept is None:
        raise NothingToResume(folder.path)
    return kept


def read_summary(out: Path) -> Summary:
    """Read a run's summary. Raises ``NothingToResume`` without one, ``CheckpointError`` if it is damaged."""
    path = out / "summary.json"
    if not path.is_file():
        raise NothingToResume(out)
    try:
        content = path.read_bytes()
        found = re.search(rb'"schema": *"gaisnet.summary/([0-9]{1,9})"', content)
        if found is not None and found[1] != b"1":
            raise CheckpointVersion(path, found[1].decode(), "1")
        return Summary.model_validate_json(content)
    except (OSError, ValidationError) as error:
        raise CheckpointError(path, str(error)) from error


def local_build(config: Config, domains: Mapping[str, DomainData], new_ledger: Callable[[], Ledger]) -> Build:
    """Return a function that builds all tiers in this process."""
    data = {name: data for domain in domains.values() for name, data in domain.devices.items()}
    shapes = {name: TaskTemplate(domain.template, domain.labels) for name, domain in domains.items()}
    inputs = load_public_inputs(config)
    return lambda foundation, text, progress: build_network(
        config, foundation, shapes, data, text, progress, new_ledger, inputs
    )


def majorities(domains: Mapping[str, DomainData]) -> dict[str, float | None]:
    """Return the accuracy of always giving the most frequent answer, by domain.

    None without a closed set of answers.
    """
    return {name: majority_share(domain) for name, domain in domains.items()}


def carry_out(
    config: Config, folder: RunFolder, progress: Progress, build: Build, majorities: Mapping[str, float | None]
) -> Summary:
    """Run the remaining cycles of a folder's run on the network that ``build`` makes. Raises ``GaisnetError``."""
    run = Run(config, folder, progress, build, majorities)
    for _ in run.cycles():
        pass
    return run.summary


class Run:
    """A network, and its measurements so far."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        progress: Progress,
        build: Build,
        majorities: Mapping[str, float | None],
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._steps = 0
        self._seconds: dict[str, float] = {}
        progress("load", 0, 2, {})
        check_sizes(config)
        foundation = load_foundation(config.model)
        self._config = config = with_family_defaults(config, foundation.family)
        kept = folder.store.load(_CHECKPOINT)
        self._digest = _same_model(folder, foundation, kept[0] if kept else {})
        self._base_model, self._layers_path = foundation.source, foundation.family.layers_path
        self._writes, self._reads_text = not foundation.family.is_encoder, foundation.reader is not None
        self._context = with_context(config, foundation.model.config).model.context
        self._longest_example = longest_example(foundation.model.config)
        progress("load", 1, 2, {})
        self._network = build(foundation, public_text(config.absorb), self._note)
        self._seen = self._network.traffic()
        if kept is not None:
            state, tensors = kept
            self._network.restore(state["network"], tensors)
            self._steps = state["steps"]
            folder.cut_metrics(state["metrics_bytes"], self._steps)
        self._network.install()
        progress("load", 2, 2, {})
        if kept is None:
            self.summary = self._first_summary(majorities)
        else:
            self.summary = Summary.model_validate(state["summary"]).model_copy(
                update={"config": config.model_dump(mode="json")}
            )
        self._write()

    def cycles(self) -> Iterator[Cycle]:
        """Carry out the cycles that the run lacks; yield the record of each when it is written."""
        while len(self.summary.cycles) <= self._config.cycles:
            self.cycle()
            yield self.summary.cycles[-1]

    def cycle(self) -> None:
        """Release, fine-tune, absorb; then measure and write."""
        network = self._network
        relays = self._timed("release", network.release)
        updates = self._timed("fine_tune", network.fine_tune)
        verdicts = self._timed("absorb", network.absorb)
        losses = {domain: {"loss": u.loss, "num_examples": u.num_examples} for domain, u in updates.items()}
        self._folder.log({"event": "fine_tune", "cycle": len(self.summary.cycles), "domains": losses})
        said = [*_relays_kept(relays), *map(str, verdicts)]
        faults = [f"{domain}: {fault}" for domain, update in updates.items() for fault in update.faults]
        entry = self._measure(len(self.summary.cycles), said, relays, faults, self.summary.cycles[-1])
        self.summary = self.summary.model_copy(update={"cycles": [*self.summary.cycles, entry]}).with_gaps()
        self._write()

    def _first_summary(self, majorities: Mapping[str, float | None]) -> Summary:
        cloud, sizes = self._network.cloud, self._network.cloud.sizes
        _, tensors = cloud.adapter(self._domains[0])
        return Summary(
            seed=self._config.seed,
            config=self._config.model_dump(mode="json"),
            model=ModelFigures(
                foundation_params=sizes.foundation_params,
                foundation_layers=sizes.foundation_layers,
                domain_layers=sizes.domain_layers,
                trainable_params=sum(tensor.numel() for tensor in tensors.values()),
                context=self._context,
                longest_example=self._longest_example,
            ),
            device=DeviceFigures(params_fraction=sizes.split_device_params / sizes.foundation_params),
            examples=self._examples(),
            majority=dict(majorities),
            follows={edge.domain: edge.follows for edge in self._config.edges if edge.follows is not None},
            cycles=[self._measure(0, [], {}, [], None)],
        )

    def _examples(self) -> dict[str, Examples]:
        """Return lengths of examples as devices report them; those of an edge that is away are missing."""
        found = self._network.lengths()
        return {
            device.name: Examples(**asdict(found[edge.domain][device.name]))
            for edge, device in self._config.each_device()
            if device.name in found.get(edge.domain, {})
        }

    def _measure(
        self,
        number: int,
        said: list[str],
        relays: Mapping[str, Distillation],
        faults: list[str],
        before: Cycle | None,
    ) -> Cycle:
        scores, everywhere = self._timed("evaluate", self._evaluate)
        entry = Cycle(
            cycle=number,
            foundation=_scores(scores.foundation),
            domain=_scores(scores.domain),
            merged=_scores(scores.merged),
            matrix=everywhere,
            retention=self._retention(),
            bytes=self._traffic(),
            seconds=Seconds(**{verb: self._seconds.pop(verb, 0.0) for verb in Seconds.model_fields}),
            gate=said,
            faults=[*faults, *self._network.drain_faults()],
            relay={domain: _relay_loss(result) for domain, result in relays.items()},
        )
        if before is not None:
            noticed = [*entry.fallen_since(before), *entry.merged_below_own()]
            entry = entry.model_copy(update={"gate": [*said, *noticed]})
        self._folder.log_cycle(entry)
        return entry

    def _evaluate(self) -> tuple[Scores, Matrix | None]:
        scores = self._network.evaluate()
        if not self._config.evaluate.everywhere:
            return scores, None
        found = self._network.evaluate_across_domains(scores)
        return scores, Matrix(
            foundation={whose: _scores(on) for whose, on in found.foundation.items()},
            domain={whose: _scores(on) for whose, on in found.domain.items()},
        )

    def _retention(self) -> Retention:
        cost = self._network.cloud.retention
        worst = max((cost[name] for name in self._domains), default=None) if cost else None
        if self._writes:
            return Retention(perplexity=worst, adapters=dict(cost))
        return Retention(drift=worst, adapters=dict(cost))

    def _traffic(self) -> LinkBytes:
        """Return bytes since the previous entry; entry 0 has everything sent once, at the start."""
        now, before = self._network.traffic(), self._seen
        self._seen = now

        def since(kind: LinkKind) -> Traffic:
            up, down = now[kind].bytes_up - before[kind].bytes_up, now[kind].bytes_down - before[kind].bytes_down
            return Traffic(up=max(up, 0), down=max(down, 0))  # a restarted site may have lost count of its last bytes

        return LinkBytes(device_edge=since("device_edge"), edge_cloud=since("edge_cloud"))

    @property
    def _domains(self) -> list[str]:
        """Return the domains that train; others have no adapter of their own."""
        return [edge.domain for edge in self._config.learning_edges()]

    def _write(self) -> None:
        """Write summary, report and adapters, then the checkpoint, so that a resumed run has them all."""
        cloud = self._network.cloud
        for name in cloud.adapters:
            spec, tensors = cloud.adapter(name)
            folder = self._folder.adapters_dir / name
            save_adapter(folder, spec, tensors, self._base_model, self._layers_path)
            card = render_card(name, spec, self._base_model, self._reads_text, self._config, self.summary)
            write_text(folder / CARD_NAME, card)
        self._folder.write_summary(self.summary)
        self._folder.write_report(self.summary)
        network, tensors = self._network.checkpoint_state()
        state = {
            "network": network,
            "steps": self._steps,
            "foundation": self._digest,
            "metrics_bytes": self._folder.metrics_bytes(),
            "summary": self.summary.to_json(),
        }
        self._folder.store.save(_CHECKPOINT, state, tensors)

    def _timed(self, verb: str, work: Callable[[], T]) -> T:
        started = time.perf_counter()
        self._progress(verb, 0, 1, {})
        result = work()
        self._seconds[verb] = time.perf_counter() - started
        self._progress(verb, 1, 1, {})
        return result

    def _note(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Pass progress on, and keep its figures as curves."""
        for tag, value in figures.items():
            self._folder.scalar(f"steps/{tag}", value, self._steps)
            self._steps += 1
        self._progress(stage, done, total, figures)


def _same_model(folder: RunFolder, foundation: Foundation, state: Mapping[str, Any]) -> str:
    """Return the digest of the foundation model. Raises ``ConfigError`` if the run began with another one."""
    if state.get("foundation", foundation.digest) != foundation.digest:  # earlier versions kept none
        asked = f"model.foundation '{foundation.name}' of the run in '{folder.path}'"
        raise ConfigError(asked, "has other weights than the model that the run began with", "name that one's folder")
    return foundation.digest


def _relay_loss(result: Distillation) -> RelayLoss:
    return RelayLoss(
        loss_before=result.error_before,
        loss_after=result.error_after,
        kl_before=result.kl_before,
        kl_after=result.kl_after,
    )


def _relays_kept(relays: Mapping[str, Distillation]) -> list[str]:
    return [
        f"kept the relay of '{domain}' as it was: a new one leaves the error on generated text "
        f"at {result.error_after:.4f}, before it was {result.error_before:.4f}"
        for domain, result in relays.items()
        if not result.helped
    ]


def _scores(reports: Mapping[str, EvaluationReport]) -> dict[str, Score]:
    return {
        domain: Score(
            accuracy=report.num_correct / report.num_examples,
            loss=report.loss_sum / report.num_tokens,
            num_examples=report.num_examples,
        )
        for domain, report in reports.items()
    }
