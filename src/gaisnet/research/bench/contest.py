"""Fine-tuning by GaisNet and by its alternatives: one model, the same examples, steps and settings.

Contenders take turns, round after round, each round with its own seed, so that a change in the machine's speed affects
all of them. Speed counts samples per second; accuracy is a separate column.
"""

import gc
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from gaisnet.checkpoint import write_text
from gaisnet.config import Config
from gaisnet.data.devices import load_domains, public_text
from gaisnet.engines.local_serving import num_cores
from gaisnet.errors import ConfigError
from gaisnet.learning.relay import TaskTemplate
from gaisnet.progress import Progress, silent
from gaisnet.research.bench.contenders.centralised import Centralised
from gaisnet.research.bench.contenders.federated import Federated
from gaisnet.research.bench.contenders.network import GaisNet
from gaisnet.research.bench.contenders.plain_split import PlainSplit
from gaisnet.research.bench.contenders.task import Contender, Result, Task
from gaisnet.research.bench.contenders.unsplit import run_unsplit
from gaisnet.research.bench.spread import Spread

FILE_NAME = "bench.json"


class Figures(BaseModel):
    """Figures of one contender."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_per_s: Spread = Field(description="Examples times epochs, over the seconds of all epochs, caches included.")
    seconds_to_accuracy: Spread | None = Field(
        description="Of learning, until it is first seen (after an epoch; GaisNet: in the end) to be as good as "
        "'centralised_all' in the end of the same round; null if it is not in any round."
    )
    bytes_per_sample: Spread = Field(description="On the links of all devices, both ways, per example and epoch.")
    device_peak_bytes: Spread = Field(
        description="Most memory of a device's process, interpreter included; centralised: where examples are pooled."
    )
    device_flops_per_sample: Spread = Field(description="Per example and epoch, from the model's shape.")
    accuracy: Spread = Field(description="On held-out examples, in the end.")


class Contenders(BaseModel):
    """Figures of all contenders."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    centralised_all: Figures = Field(description="Trainer and peft on pooled data, adapters on all layers.")
    centralised_late: Figures = Field(description="The same, adapters on GaisNet's layers only.")
    federated: Figures = Field(description="Every device holds the whole model; adapters on all layers; FedAvg.")
    split_plain: Figures = Field(description="U-shaped split learning: float32, all positions, every step.")
    gaisnet: Figures


class Ratios(BaseModel):
    """Ratios, each taken within a round: the purpose of the command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    speed_vs_centralised_all: Spread
    speed_vs_centralised_late: Spread
    bytes_vs_split_plain: Spread
    device_memory_vs_federated: Spread


class Reference(BaseModel):
    """The unsplit domain model on pooled data, Trainer and peft, adapters on GaisNet's layers; not a contender."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples_per_s: Spread
    accuracy: Spread


class Differences(BaseModel):
    """Differences of accuracy between GaisNet and others within a round, from its own unsplit model to the best."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    accuracy_minus_unsplit_domain_model: Spread = Field(
        description="What splitting, rounding on devices and links, and the anchor change."
    )
    accuracy_minus_centralised_late: Spread = Field(description="And the recipe of the domain model.")
    accuracy_minus_centralised_all: Spread = Field(description="And that only the late layers learn.")


class LearningFigures(BaseModel):
    """Contents of ``bench.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.research.bench/1", alias="schema", pattern="^gaisnet.research.bench/1$")
    cores: int
    torch: str
    config: dict[str, Any]
    num_examples: int = Field(description="To learn from, of all devices.")
    contenders: Contenders
    unsplit_domain_model: Reference
    ratios: Ratios
    differences: Differences


@dataclass
class _Kept:
    """Results of one contender, one value per round."""

    results: list[Result] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)


def measure_learning(config: Config, rounds: int = 5, progress: Progress = silent) -> LearningFigures:
    """Train all contenders on the examples of the one edge of ``config``. Raises ``GaisnetError``.

    Args:
        config: One edge with split devices; batch size, epochs and the like hold for all contenders.
        rounds: Number of rounds; every figure is their median.
        progress: Told about every turn.
    """
    check_contest(config)
    ((domain, data),) = load_domains(config).items()
    task = Task.load(config, data)
    shape = TaskTemplate(data.template, data.labels)
    contenders: dict[str, Contender] = {
        "centralised_all": Centralised("centralised_all", late=False),
        "centralised_late": Centralised("centralised_late", late=True),
        "federated": Federated(),
        "split_plain": PlainSplit(),
        "gaisnet": GaisNet(data.devices, shape, public_text(config.absorb)),
    }
    kept, unsplit = {name: _Kept() for name in contenders}, list[Result]()
    turns = len(contenders) + 1
    for number in range(rounds):
        for at, (name, contender) in enumerate(_turned(contenders, number)):
            progress("bench_learning", number * turns + at, rounds * turns, {})
            gc.collect()  # freed memory of one contender must not cost the next one fresh pages
            kept[name].results.append(contender.run(task, config.seed + number))
            kept[name].peaks.append(contender.device_peak_bytes(task, config.seed + number))
        progress("bench_learning", number * turns + turns - 1, rounds * turns, {})
        gc.collect()
        unsplit.append(run_unsplit(task, config.seed + number))
    progress("bench_learning", rounds * turns, rounds * turns, {})
    best = kept["centralised_all"]
    figures = {name: _figures(kept[name], best, one.device_flops(task)) for name, one in contenders.items()}
    return LearningFigures(
        cores=num_cores(),
        torch=torch.__version__,
        config=json.loads(config.model_dump_json()),
        num_examples=len(task.pooled),
        contenders=Contenders(**figures),
        unsplit_domain_model=Reference(
            samples_per_s=Spread.summarize([result.samples_per_s for result in unsplit]),
            accuracy=Spread.summarize([result.accuracy for result in unsplit]),
        ),
        ratios=_ratios(kept),
        differences=_differences(kept, unsplit),
    )


def check_contest(config: Config) -> None:
    """Raise ``ConfigError`` for a network that some contender cannot train on."""
    if len(config.edges) != 1:
        raise ConfigError("the contest's edges", f"there are {len(config.edges)}", "name one, all learn its domain")
    local = [device.name for _, device in config.each_device() if device.mode != "split"]
    if local:
        raise ConfigError(f"device '{local[0]}'", "is local", "let all devices be split, the contest is about those")
    tune = config.fine_tune
    if tune.rounds_in_pass > 1:
        found = f"is {tune.local_epochs}"
        raise ConfigError("fine_tune.local_epochs", found, "name whole passes, all contenders learn in one round")
    if config.tail_layers:
        raise ConfigError("tail_layers", f"is {config.tail_layers}", "set it to 0, as plain split learning has it")


def write_learning(figures: LearningFigures, path: Path) -> None:
    """Write the figures to a file. Raises ``OutputNotWritable``."""
    write_text(path, figures.model_dump_json(indent=2) + "\n")


def _turned(contenders: Mapping[str, Contender], by: int) -> Iterable[tuple[str, Contender]]:
    """Rotate, so that each round starts with another contender."""
    every = list(contenders.items())
    first = by % len(every)
    return [*every[first:], *every[:first]]


def _figures(kept: _Kept, best: _Kept, flops: float) -> Figures:
    def spread(value: Callable[[Result], float]) -> Spread:
        return Spread.summarize([value(result) for result in kept.results])

    pairs = zip(kept.results, best.results, strict=True)
    seconds = [found for mine, its in pairs if (found := mine.seconds_to(its.accuracy)) is not None]
    return Figures(
        samples_per_s=spread(lambda r: r.samples_per_s),
        seconds_to_accuracy=Spread.summarize(seconds) if seconds else None,
        bytes_per_sample=spread(lambda r: r.bytes_per_sample),
        device_peak_bytes=Spread.summarize(kept.peaks),
        device_flops_per_sample=Spread.summarize([flops] * len(kept.results)),
        accuracy=spread(lambda r: r.accuracy),
    )


def _ratios(kept: Mapping[str, _Kept]) -> Ratios:
    own = kept["gaisnet"]

    def of(value: Callable[[Result], float], other: str) -> Spread:
        pairs = zip(own.results, kept[other].results, strict=True)
        return Spread.summarize([value(mine) / value(its) for mine, its in pairs])

    peaks: Sequence[tuple[int, int]] = list(zip(own.peaks, kept["federated"].peaks, strict=True))
    return Ratios(
        speed_vs_centralised_all=of(lambda r: r.samples_per_s, "centralised_all"),
        speed_vs_centralised_late=of(lambda r: r.samples_per_s, "centralised_late"),
        bytes_vs_split_plain=of(lambda r: r.bytes_per_sample, "split_plain"),
        device_memory_vs_federated=Spread.summarize([mine / its for mine, its in peaks]),
    )


def _differences(kept: Mapping[str, _Kept], unsplit: Sequence[Result]) -> Differences:
    def to(others: Sequence[Result]) -> Spread:
        pairs = zip(kept["gaisnet"].results, others, strict=True)
        return Spread.summarize([mine.accuracy - its.accuracy for mine, its in pairs])

    return Differences(
        accuracy_minus_unsplit_domain_model=to(unsplit),
        accuracy_minus_centralised_late=to(kept["centralised_late"].results),
        accuracy_minus_centralised_all=to(kept["centralised_all"].results),
    )
