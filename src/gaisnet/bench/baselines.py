"""What a finished run is held against: its own examples, learned from where they may not be, alone, or not at all.

Each baseline is written into the run's summary and report as soon as it is there, so that one that is stopped goes on
with the next.
"""

import random
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from gaisnet.bench.contenders.centralised import adapted, train
from gaisnet.bench.contenders.task import Task, accuracy
from gaisnet.config import Config
from gaisnet.engines.local import build_network
from gaisnet.experiments.data import DomainData, load_domains, retention_text
from gaisnet.experiments.output import RunFolder
from gaisnet.experiments.run import hold_against, kept_config, read_summary
from gaisnet.experiments.summary import Baselines, Summary
from gaisnet.models.foundation import load_foundation
from gaisnet.progress import Progress, silent
from gaisnet.relay.downward import TaskShape
from gaisnet.tiers.examples import Tokens

SHOTS = 8
"""Examples in the prompt of ``few_shot``."""

_SCRATCH_LEARNING_RATE = 5e-4  # of all weights; LoRA's would be far too high for them
_RETENTION_CHARS = 40_000

One = Callable[[Config, DomainData, int, int], float]
"""Measures a baseline on one domain: settings with the whole run's passes, examples, layers of a DM, seed."""


def measure_baselines(out: Path, progress: Progress = silent) -> Summary:
    """Measure what the run in ``out`` lacks of its baselines; its examples must be on this machine.

    Raises:
        NothingToResume: No run, or one that has not finished a cycle.
        GaisnetError: What keeps a model or the examples from being loaded.
    """
    with RunFolder.resume(out) as folder:
        config = kept_config(folder)
        summary = read_summary(out)
        domains = load_domains(config)
        config = _with_all_passes(config, max(1, len(summary.cycles) - 1))
        found = summary.baselines or Baselines()
        missing = [
            (kind, name) for kind in Baselines.model_fields for name in domains if name not in getattr(found, kind)
        ]
        for number, (kind, name) in enumerate(missing):
            progress("baselines", number, len(missing), {})
            if name in getattr(found, kind):
                continue  # measured together with another domain's
            if kind == "no_relay":
                new = without_relay(config, domains)
            else:
                new = {name: _ONES[kind](config, domains[name], summary.model.domain_layers, config.seed)}
            found = found.model_copy(update={kind: {**getattr(found, kind), **new}})
            summary = hold_against(folder, found)
        progress("baselines", len(missing), len(missing), {})
        return summary


def _with_all_passes(config: Config, cycles: int) -> Config:
    """Learning at once what the network learns over its cycles: as many passes over the examples."""
    rounds = config.fine_tune.edge_rounds * cycles
    return config.model_copy(update={"fine_tune": config.fine_tune.model_copy(update={"edge_rounds": rounds})})


def without_relay(config: Config, domains: Mapping[str, DomainData]) -> dict[str, float]:
    """Every edge with its devices and its DM, as they come from the cloud, without a relay: accuracies by domain."""
    config = config.model_copy(update={"relay": config.relay.model_copy(update={"enabled": False})})
    shapes = {name: TaskShape(data.template, data.labels) for name, data in domains.items()}
    devices = {name: mine for data in domains.values() for name, mine in data.devices.items()}
    foundation = load_foundation(config.model)
    network = build_network(config, foundation, shapes, devices, retention_text(_RETENTION_CHARS))
    network.install()
    network.fine_tune()
    return {name: report.num_correct / report.num_examples for name, report in network.evaluate().domain.items()}


def pooled(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """LoRA on all layers of the FM, with transformers' Trainer and peft."""
    task = _task(config, data)
    return train(adapted(task, False, seed), task, seed).accuracy


def from_scratch(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """A model of the FM's shape with as many layers as a DM, all of its weights learned from nothing."""
    task = _task(config, data, _SCRATCH_LEARNING_RATE)
    shape = task.foundation_config()
    shape.num_hidden_layers = num_layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:num_layers]
    torch.manual_seed(seed)
    return train(AutoModelForCausalLM.from_config(shape, dtype=torch.float32), task, seed).accuracy


def zero_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """The FM as it is, asked as the examples ask."""
    return _asked(config, data, 0, seed)


def few_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """The FM as it is, with some training examples before the question."""
    return _asked(config, data, SHOTS, seed)


def _task(config: Config, data: DomainData, learning_rate: float | None = None) -> Task:
    tune = config.fine_tune
    changes: dict[str, float] = {"local_epochs": tune.edge_rounds * tune.local_epochs, "edge_rounds": 1}
    if learning_rate is not None:
        changes["learning_rate"] = learning_rate
    return Task.of(config.model_copy(update={"fine_tune": tune.model_copy(update=changes)}), data)


def _asked(config: Config, data: DomainData, num_shots: int, seed: int) -> float:
    foundation = load_foundation(config.model, plain=True)
    encode = foundation.tokenizer.encode
    train_examples = [example for mine in data.devices.values() for example in mine.train]
    shots = random.Random(seed).sample(train_examples, min(num_shots, len(train_examples)))
    shown = "".join(f"{shot.prompt}{shot.completion}\n\n" for shot in shots)
    asked = []
    for mine in data.devices.values():
        for example in mine.test:
            prompt = encode(shown + example.prompt, add_special_tokens=False)
            answer = encode(example.completion, add_special_tokens=False)
            asked.append(Tokens((*prompt, *answer[:-1]), tuple(answer)))
    return accuracy(foundation.model, asked)


_ONES: Mapping[str, One] = {
    "pooled": pooled,
    "scratch": from_scratch,
    "zero_shot": zero_shot,
    "few_shot": few_shot,
}
