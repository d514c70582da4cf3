"""How well a finished run answers, in ratios of two things that are done in turn in one process, round after round.

Nothing of the run is changed: what is learned here while it answers is thrown away.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from gaisnet.bench.learner import Learner
from gaisnet.bench.spread import Spread
from gaisnet.bench.writing import Prompt, Unsplit, Writers, batches, num_same
from gaisnet.checkpoint import write_text
from gaisnet.config import RoutingSettings
from gaisnet.engines.serving import num_cores
from gaisnet.experiments.front import device_of
from gaisnet.experiments.serve import ServedRun, serve_run
from gaisnet.models.foundation import load_foundation
from gaisnet.progress import Progress, silent
from gaisnet.serving.bodies import Target
from gaisnet.serving.calibration import Trial, calibrate
from gaisnet.serving.device import ServedDevice
from gaisnet.serving.routing import DEFAULT_MEASURE
from gaisnet.serving.sampling import Sampling
from gaisnet.serving.speculation import DraftLength, Tally, write_speculatively

FILE_NAME = "serving.json"

_HALVINGS = 100
"""Of the held-out examples, whatever the rounds: they cost nothing, and a median of five says little of so few."""


class Ratios(BaseModel):
    """What the command is for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    single_vs_generate: Spread = Field(description="Tokens/s of one session, split, over transformers' generate.")
    batch16_vs_single: Spread = Field(
        description="Tokens/s of 16 sessions at once over those of one, once all have read their prompts."
    )
    p95_tuning_vs_idle: Spread = Field(
        description="Time between tokens, 95th percentile, with fine-tuning over without."
    )
    tuning_speed_kept: Spread = Field(
        description="Steps/s of fine-tuning while it answers over those while it does not."
    )
    tokens_per_cloud_call: Spread = Field(description="Tokens of speculative answers per call to the FM's body.")


class AutoFigures(BaseModel):
    """Of the model 'auto' in a domain, or in its mix with other domains' requests.

    Thresholds are from one half of the held-out examples, judged on the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain_kept: Spread | None = Field(
        description="Share of what always asking the FM gains; null where it gains nothing."
    )
    escalated: Spread = Field(description="Share of the requests that the FM is asked for.")
    accuracy: Spread
    domain_accuracy: Spread = Field(description="Of the DM alone.")
    foundation_accuracy: Spread = Field(description="Of the FM, always asked, with what 'auto' escalates to.")


class Same(BaseModel):
    """Answers that equal those of the model that they must equal, token for token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_answers: int
    edge: int = Field(description="Of the DM, split, and the DM in one piece.")
    cloud: int = Field(description="Of the FM, split, and the FM in one piece.")
    speculative: int = Field(description="Of the FM with the domain's adapter, with drafts and without.")


class ServingFigures(BaseModel):
    """All of ``serving.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.serving/2", alias="schema", pattern="^gaisnet.serving/2$")
    run: str
    cores: int
    torch: str
    ratios: Ratios
    auto: dict[str, AutoFigures] = Field(
        description="By domain, on its own examples; as 'DOMAIN+others' on a mix with those of other domains."
    )
    same: Same
    by_body: dict[str, dict[str, Spread]] = Field(description="What the ratios are made of, for 'edge' and 'cloud'.")


@dataclass(frozen=True)
class Effort:
    """How much is done."""

    rounds: int = 5
    prompts: int = 4  # per round, to one session
    tokens: int = 64
    at_once: int = 16
    beside: int = 4  # sessions that answer beside fine-tuning
    seconds: float = 15.0  # of each window with or without fine-tuning


def measure_serving(run: Path, effort: Effort | None = None, progress: Progress = silent) -> ServingFigures:
    """Measure a finished run; its folder is claimed meanwhile. Raises ``GaisnetError``."""
    learner = Learner(progress)
    with serve_run(run, (), learner) as served:
        return _Bench(served, learner, effort or Effort(), progress).figures(run)


def write_figures(figures: ServingFigures, path: Path) -> None:
    """Put them into a file. Raises ``OutputNotWritable``."""
    write_text(path, figures.model_dump_json(indent=2) + "\n")


class _Bench:
    """A run that is served, and what is measured of it."""

    def __init__(self, served: ServedRun, learner: Learner, effort: Effort, progress: Progress) -> None:
        self._served = served
        self._learner = learner
        self._effort = effort
        self._progress = progress
        self._device: ServedDevice = device_of(served, None)
        self._home = self._device.domain
        self._writers = Writers(self._device.parts, served.bodies)
        domain = self._device.domains[self._home]
        self._targets = {
            "edge": Target("edge", domain.adapters, self._home),
            "cloud": Target("cloud", (), self._home),
        }
        self._prompts = [each.prompt for each in domain.held_out]
        self._by_body: dict[str, dict[str, Spread]] = {"edge": {}, "cloud": {}}

    def figures(self, run: Path) -> ServingFigures:
        """All of them, the models as they are first: learning comes last."""
        same: dict[str, Any] = {"num_answers": self._effort.rounds * self._effort.prompts}
        single = {place: self._single(place, same) for place in self._targets}
        batch = {place: self._batch(place) for place in self._targets}
        calls = self._speculation(same)
        auto = {key: found for name in self._device.domains for key, found in self._auto(name).items()}
        p95, kept = self._beside_learning()
        return ServingFigures(
            run=run.name,
            cores=num_cores(),
            torch=torch.__version__,
            ratios=Ratios(
                single_vs_generate=min(single.values(), key=lambda spread: spread.median),
                batch16_vs_single=min(batch.values(), key=lambda spread: spread.median),
                p95_tuning_vs_idle=p95,
                tuning_speed_kept=kept,
                tokens_per_cloud_call=calls,
            ),
            auto=auto,
            same=Same(**same),
            by_body=self._by_body,
        )

    def _single(self, place: str, same: dict[str, Any]) -> Spread:
        """One session against the model in one piece, prompt by prompt."""
        unsplit, target, effort = self._unsplit(place), self._targets[place], self._effort
        split_s: list[float] = []
        whole_s: list[float] = []
        ratios: list[float] = []
        same[place] = 0
        self._writers.one_by_one(target, self._prompts[:1], effort.tokens)  # whatever is done once only
        unsplit.write(self._prompts[:1], effort.tokens)
        for prompts in self._rounds(f"single_{place}", effort.prompts, ratios):
            split = self._writers.one_by_one(target, prompts, effort.tokens)
            whole = unsplit.write(prompts, effort.tokens)
            same[place] += num_same(split.answers, whole.answers)
            split_s.append(split.tokens_per_s)
            whole_s.append(whole.tokens_per_s)
            ratios.append(split.tokens_per_s / whole.tokens_per_s)
        self._by_body[place] |= {
            "single_tokens_per_s": Spread.of(split_s),
            "generate_tokens_per_s": Spread.of(whole_s),
            "single_vs_generate": Spread.of(ratios),
        }
        return Spread.of(ratios)

    def _batch(self, place: str) -> Spread:
        """Many sessions against one."""
        target, effort = self._targets[place], self._effort
        speeds: list[float] = []
        ratios: list[float] = []
        whole_ratios: list[float] = []
        for prompts in self._rounds(f"batch_{place}", effort.at_once, ratios):
            one = self._writers.one_by_one(target, prompts[:1], effort.tokens)
            many = self._writers.at_once(target, prompts, effort.tokens)
            speeds.append(many.writing_tokens_per_s)
            ratios.append(many.writing_tokens_per_s / one.writing_tokens_per_s)
            whole_ratios.append(many.tokens_per_s / one.tokens_per_s)
        self._by_body[place] |= {
            "batch_tokens_per_s": Spread.of(speeds),
            "batch16_vs_single": Spread.of(ratios),
            "batch16_vs_single_with_prompts": Spread.of(whole_ratios),
        }
        return Spread.of(ratios)

    def _speculation(self, same: dict[str, Any]) -> Spread:
        """Drafts of the DM, checked by the FM with the domain's adapter."""
        adapters = self._device.domains[self._home].foundation_adapters
        checker, drafter = Target("cloud", adapters, self._home), self._targets["edge"]
        calls: list[float] = []
        same["speculative"] = 0
        for prompts in self._rounds("speculation", self._effort.prompts, calls):
            length, tally, answers = DraftLength(), Tally(), []
            for prompt in prompts:
                answers.append(tuple(self._speculative(drafter, checker, prompt, length, tally)))
            plain = self._writers.one_by_one(checker, prompts, self._effort.tokens)
            same["speculative"] += num_same(answers, plain.answers)
            calls.append(tally.num_tokens / tally.num_checks)
        return Spread.of(calls)

    def _speculative(
        self, drafter: Target, checker: Target, prompt: Prompt, length: DraftLength, tally: Tally
    ) -> Iterator[int]:
        parts, num_positions = self._device.parts, len(prompt) + self._effort.tokens
        drafts, checks = (
            self._served.bodies.open(target, parts.first, parts.stop, num_positions) for target in (drafter, checker)
        )
        sampling = Sampling(max_tokens=self._effort.tokens)
        return write_speculatively(parts, drafts, checks, prompt, sampling, length, tally)

    def _auto(self, name: str) -> dict[str, AutoFigures]:
        """A threshold from one half of the held-out examples, judged on the other, for several ways to halve them."""
        settings = RoutingSettings()
        own, others = self._device.trials(name, settings, DEFAULT_MEASURE, self._progress)
        mixes = {name: own} | ({f"{name}+others": [*own, *others]} if others else {})
        every = {key: [_halves(mix, seed) for seed in range(_HALVINGS)] for key, mix in mixes.items()}
        return {key: auto_figures(halves, settings) for key, halves in every.items()}

    def _beside_learning(self) -> tuple[Spread, Spread]:
        """Answers alone, fine-tuning alone, and both; the DM writes that learns."""
        effort, target = self._effort, self._targets["edge"]
        p95s: list[float] = []
        kept: list[float] = []
        alone_s: list[float] = []
        beside_s: list[float] = []

        def p95() -> float:
            gaps = self._writers.gaps(target, self._prompts, effort.tokens, effort.beside, effort.seconds)
            return quantiles(gaps, n=20)[-1]

        with self._learner.learning(self._served.bodies.network):
            for _ in self._rounds("tuning", 0, p95s):
                idle = p95()
                with self._learner.runs() as alone:
                    time.sleep(effort.seconds)
                with self._learner.runs() as beside:
                    busy = p95()
                alone_s.append(idle)
                beside_s.append(busy)
                p95s.append(busy / idle)
                kept.append(beside.steps_per_s / alone.steps_per_s)
        self._by_body["edge"] |= {"p95_idle_s": Spread.of(alone_s), "p95_tuning_s": Spread.of(beside_s)}
        return Spread.of(p95s), Spread.of(kept)

    def _unsplit(self, place: str) -> Unsplit:
        model = load_foundation(self._served.config.model, plain=place == "cloud").model
        unsplit = Unsplit(model, self._served.bodies.turn)
        if place == "cloud":
            return unsplit
        return unsplit.with_body(self._served.bodies.body("edge", self._home), self._device.parts.first)

    def _rounds(self, stage: str, num_prompts: int, found: Sequence[float]) -> Iterator[list[Prompt]]:
        """The prompts of every round; tells how far it is, and what was found."""
        total = self._effort.rounds
        for number, prompts in enumerate(islice(batches(self._prompts, num_prompts), total)):
            self._tell(stage, number, found)
            yield prompts
        self._tell(stage, total, found)

    def _tell(self, stage: str, number: int, found: Sequence[float]) -> None:
        figures = {"median": median(found)} if found else {}
        self._progress(f"bench_{stage}", number, self._effort.rounds, figures)


def auto_figures(halves: Sequence[tuple[Sequence[Trial], Sequence[Trial]]], settings: RoutingSettings) -> AutoFigures:
    """What thresholds from the first halves do on the second ones."""
    found: dict[str, list[float]] = {name: [] for name in AutoFigures.model_fields}
    for known, judged in halves:
        threshold = calibrate(known, settings, DEFAULT_MEASURE).threshold
        for name, value in _on(judged, threshold).items():
            found[name].append(value)
    return AutoFigures(**{name: Spread.of(values) if values else None for name, values in found.items()})


def _on(trials: Sequence[Trial], threshold: float) -> Mapping[str, float]:
    total = len(trials)
    alone, always = sum(t.wrong_at is None for t in trials), sum(t.foundation_right for t in trials)
    right = sum(t.right(threshold) for t in trials)
    figures = {
        "accuracy": right / total,
        "escalated": sum(t.escalated(threshold) for t in trials) / total,
        "domain_accuracy": alone / total,
        "foundation_accuracy": always / total,
    }
    return figures | ({"gain_kept": (right - alone) / (always - alone)} if always > alone else {})


def _halves(trials: Sequence[Trial], seed: int) -> tuple[list[Trial], list[Trial]]:
    order = list(trials)
    random.Random(seed).shuffle(order)
    return order[::2], order[1::2]
