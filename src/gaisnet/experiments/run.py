"""One run: the three verbs over and over, everything measured, everything written as soon as it is known."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from gaisnet.adapters.state import save_for_peft
from gaisnet.config import Config
from gaisnet.engines.local import build_network
from gaisnet.experiments.data import DomainData, load_domains, majority, retention_text
from gaisnet.experiments.output import RunFolder
from gaisnet.experiments.summary import (
    Cycle,
    DeviceFigures,
    LinkBytes,
    ModelFigures,
    RelayLoss,
    Retention,
    Score,
    Seconds,
    Summary,
    Traffic,
)
from gaisnet.messages import EvaluationReport
from gaisnet.models.foundation import load_foundation
from gaisnet.progress import Progress, silent
from gaisnet.relay.downward import Distillation, TaskShape
from gaisnet.tiers.cloud import MERGED
from gaisnet.transport.ledger import Ledger, LinkKind

T = TypeVar("T")
_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs for English


def run_experiment(config: Config, out: Path, progress: Progress = silent, ledger: Ledger | None = None) -> Summary:
    """Carry out a whole run and write its output folder. Raises ``GaisnetError``; finished cycles stay on disk."""
    domains = load_domains(config)
    with RunFolder.create(out) as folder:
        run = Run(config, domains, folder, progress, ledger or Ledger())
        for _ in range(config.cycles):
            run.cycle()
        return run.summary


class Run:
    """A network, and what has been measured of it so far."""

    def __init__(
        self,
        config: Config,
        domains: Mapping[str, DomainData],
        folder: RunFolder,
        progress: Progress,
        ledger: Ledger,
    ) -> None:
        self._config = config
        self._folder = folder
        self._progress = progress
        self._steps = 0
        self._seconds: dict[str, float] = {}
        self._seen = {"device_edge": ledger.traffic("device_edge"), "edge_cloud": ledger.traffic("edge_cloud")}
        self._domains = domains
        absorb = config.absorb
        public_text = retention_text(absorb.retention_windows * absorb.retention_tokens * _CHARACTERS_PER_TOKEN)
        progress("load", 0, 2, {})
        foundation = load_foundation(config.model)
        self._base_model = foundation.name
        progress("load", 1, 2, {})
        self._network = build_network(
            config,
            foundation,
            {name: TaskShape(domain.template, domain.labels) for name, domain in domains.items()},
            {name: data for domain in domains.values() for name, data in domain.devices.items()},
            public_text,
            self._note,
            ledger,
        )
        self._network.install()
        progress("load", 2, 2, {})
        self.summary = self._first_summary()
        self._write()

    def cycle(self) -> None:
        """Release, fine-tune, absorb; then measure and write."""
        network = self._network
        relays = self._timed("release", network.release)
        updates = self._timed("fine_tune", network.fine_tune)
        verdicts = self._timed("absorb", network.absorb)
        losses = {domain: {"loss": u.loss, "num_examples": u.num_examples} for domain, u in updates.items()}
        self._folder.log({"event": "fine_tune", "cycle": len(self.summary.cycles), "domains": losses})
        said = [*_relays_kept(relays), *map(str, verdicts)]
        entry = self._measure(len(self.summary.cycles), said, relays)
        self.summary = self.summary.model_copy(update={"cycles": [*self.summary.cycles, entry]})
        self._write()

    def _first_summary(self) -> Summary:
        cloud, sizes = self._network.cloud, self._network.cloud.sizes
        _, tensors = cloud.adapter(next(iter(self._domains)))
        return Summary(
            seed=self._config.seed,
            config=self._config.model_dump(mode="json"),
            model=ModelFigures(
                foundation_params=sizes.foundation_params,
                foundation_layers=sizes.foundation_layers,
                domain_layers=sizes.domain_layers,
                trainable_params=sum(tensor.numel() for tensor in tensors.values()),
            ),
            device=DeviceFigures(params_fraction=sizes.split_device_params / sizes.foundation_params),
            majority={name: majority(domain) for name, domain in self._domains.items()},
            cycles=[self._measure(0, [], {})],
        )

    def _measure(self, number: int, verdicts: list[str], relays: Mapping[str, Distillation]) -> Cycle:
        scores = self._timed("evaluate", self._network.evaluate)
        entry = Cycle(
            cycle=number,
            foundation=_scores(scores.foundation),
            domain=_scores(scores.domain),
            merged=_scores(scores.merged),
            retention=self._retention(),
            bytes=self._traffic(),
            seconds=Seconds(**{verb: self._seconds.pop(verb, 0.0) for verb in Seconds.model_fields}),
            gate=verdicts,
            relay={d: RelayLoss(loss_before=r.error_before, loss_after=r.error_after) for d, r in relays.items()},
        )
        self._folder.log_cycle(entry)
        return entry

    def _retention(self) -> Retention:
        cloud = self._network.cloud
        worst = max(cloud.retention[name] for name in self._domains)
        return Retention(perplexity=worst, adapters=dict(cloud.retention))

    def _traffic(self) -> LinkBytes:
        """Bytes since the entry before; entry 0 holds what was sent once, at the start."""
        return LinkBytes(device_edge=self._traffic_on("device_edge"), edge_cloud=self._traffic_on("edge_cloud"))

    def _traffic_on(self, kind: LinkKind) -> Traffic:
        now, before = self._network.ledger.traffic(kind), self._seen[kind]
        self._seen[kind] = now
        return Traffic(up=now.bytes_up - before.bytes_up, down=now.bytes_down - before.bytes_down)

    def _write(self) -> None:
        """Summary, report and adapters as of now."""
        for name in (*self._domains, MERGED):
            spec, tensors = self._network.cloud.adapter(name)
            save_for_peft(self._folder.adapters_dir / name, spec, tensors, self._base_model)
        self._folder.write_summary(self.summary)
        self._folder.write_report(self.summary)

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
