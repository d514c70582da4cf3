"""What a finished run is held against: its own examples, learned from where they may not be, alone, or not at all.

Each baseline is written into the run's summary and report as soon as it is there, so that one that is stopped goes on
with the next.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gaisnet.config import Config
from gaisnet.data.devices import DomainData, load_domains, public_text
from gaisnet.data.examples import Tokens
from gaisnet.engines.local import build_network
from gaisnet.errors import ConfigError
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.families import ATTENTION
from gaisnet.models.foundation import load_foundation, read_config
from gaisnet.models.tokenization import continuing_ids, opening_ids
from gaisnet.progress import Progress, silent
from gaisnet.research.bench.contenders.centralised import adapted, train
from gaisnet.research.bench.contenders.task import Task, accuracy, answered
from gaisnet.runs.output import RunFolder
from gaisnet.runs.run import hold_against, kept_config, kept_summary
from gaisnet.runs.summary import Baselines, Summary

SHOTS = 8
"""Examples in the prompt of ``few_shot``."""

_SCRATCH_LEARNING_RATE = 5e-4  # of all weights; LoRA's would be far too high for them

KINDS = tuple(name for name in Baselines.model_fields if name != "cycles")
"""What is measured, cheap or dear, in the order of the summary."""

One = Callable[[Config, DomainData, int, int], float]
"""Measures a baseline on one domain: settings with the whole run's passes, examples, layers of a DM, seed."""


def measure_baselines(
    out: Path, progress: Progress = silent, kinds: Sequence[str] = KINDS, overrides: Sequence[str] = ()
) -> Summary:
    """Measure what the run in ``out`` lacks of some of ``KINDS``; its examples must be on this machine.

    Those of another number of cycles are dropped. ``overrides`` as for ``kept_config``.

    Raises:
        NothingToResume: There is no run.
        ConfigError: It has not finished a cycle.
        GaisnetError: What keeps a model or the examples from being loaded, or the model is an encoder.
    """
    with RunFolder.resume(out) as folder:
        config, summary = kept_config(folder, overrides), kept_summary(folder)
        cycles, domains = len(summary.cycles) - 1, load_domains(config)
        learning = [edge.domain for edge in config.learning_edges()]
        if not cycles:
            raise ConfigError(f"baselines of '{out}'", "it has not finished a cycle", f"gaisnet run --resume {out}")
        read_config(config.model)  # an encoder is refused: it completes nothing
        found = summary.baselines
        if found is None or found.cycles != cycles:
            found = Baselines(cycles=cycles)
        asked = [kind for kind in KINDS if kind in kinds]
        missing = [(kind, name) for kind in asked for name in learning if name not in getattr(found, kind)]
        for number, (kind, name) in enumerate(missing):
            progress("baselines", number, len(missing), {})
            if name in getattr(found, kind):
                continue  # measured together with another domain's
            if kind == "no_relay":
                new = without_relay(config, domains, cycles, progress)
            else:
                at_once = _with_all_passes(config, domains[name], cycles)
                new = {name: _ONES[kind](at_once, domains[name], summary.model.domain_layers, config.seed)}
            found = found.model_copy(update={kind: {**getattr(found, kind), **new}})
            summary = hold_against(folder, found)
        progress("baselines", len(missing), len(missing), {})
        return summary


def _with_all_passes(config: Config, data: DomainData, cycles: int) -> Config:
    """Learning at once what the network learns over its cycles: as many passes, to the nearest one.

    The last mile begins anew in every cycle: the last one counts, for the share of the examples that it sees.
    """
    tune = config.fine_tune
    travelling = {name for edge in config.learning_edges() for name in edge.travelling}
    num_train = {name: len(mine.train) for name, mine in data.devices.items()}
    share = sum(num for name, num in num_train.items() if name in travelling) / max(sum(num_train.values()), 1)
    passes = round(cycles * tune.edge_rounds * tune.local_epochs + share * config.absorb.last_mile.epochs)
    at_once = {"edge_rounds": 1, "local_epochs": passes}
    return config.model_copy(update={"fine_tune": tune.model_copy(update=at_once)})


def without_relay(
    config: Config, domains: Mapping[str, DomainData], cycles: int, progress: Progress = silent
) -> dict[str, float]:
    """Every edge with its devices and its DM, as they come from the cloud, without a relay: accuracies by domain.

    They learn for as many cycles, but nothing goes up or down in between. Newcomers learn nothing.
    """
    config = config.model_copy(update={"relay": config.relay.model_copy(update={"enabled": False})})
    shapes = {name: TaskTemplate(data.template, data.labels) for name, data in domains.items()}
    devices = {name: mine for data in domains.values() for name, mine in data.devices.items()}
    foundation, text = load_foundation(config.model), public_text(config.absorb)
    network = build_network(config, foundation, shapes, devices, text, progress)
    network.install()
    for cycle in range(cycles):
        network.cycle = cycle
        network.fine_tune()
    reports = network.evaluate_domain_models()
    return {
        name: reports[name].num_correct / reports[name].num_examples
        for name in network.cloud.learning
        if name in reports
    }


def pooled(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """LoRA on all layers of the FM, with transformers' Trainer and peft."""
    task = _task(config, data)
    return _learned(adapted(task, False, seed), task, seed)


def from_scratch(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """A model of the FM's shape with as many layers as a DM, all of its weights learned from nothing."""
    task = _task(config, data, _SCRATCH_LEARNING_RATE)
    shape = task.foundation_config()
    shape.num_hidden_layers = num_layers
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:num_layers]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        shape, trust_remote_code=False, attn_implementation=ATTENTION, dtype=torch.float32
    )
    return _learned(model, task, seed)


def _learned(model: Any, task: Task, seed: int) -> float:
    """Accuracy after all passes. The learning rate falls to zero, as the Trainer has it unless it is told.

    Logits are made of answers only, which takes less time for the same losses.
    """
    train(model, replace(task, test=()), seed, "linear", answered)
    return accuracy(model.eval(), task.test)


def zero_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """The FM as it is, asked as the examples ask."""
    return _asked(config, data, 0, seed)


def few_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """The FM as it is, with some training examples before the question."""
    return _asked(config, data, SHOTS, seed)


def _task(config: Config, data: DomainData, learning_rate: float | None = None) -> Task:
    if learning_rate is not None:
        tune = config.fine_tune.model_copy(update={"learning_rate": learning_rate})
        config = config.model_copy(update={"fine_tune": tune})
    return Task.of(config, data)


def _asked(config: Config, data: DomainData, num_shots: int, seed: int) -> float:
    """Held-out prompts as everybody sees them, a context's worth of tokens at most, and so each example before them."""
    foundation = load_foundation(config.model, plain=True)
    task = Task.of(config, data)
    shots = random.Random(seed).sample(task.pooled, min(num_shots, len(task.pooled)))
    opening, gap = opening_ids(foundation.tokenizer), continuing_ids(foundation.tokenizer, "\n\n")
    shown = [token for shot in shots for token in (*shot.input_ids[len(opening) :], *gap)]
    shown = [*opening, *shown] if shots else []
    skipped = len(opening) if shots else 0  # one text opens once
    return accuracy(foundation.model, [_open_ended(tokens, skipped) for tokens in task.test], shown)


def _open_ended(tokens: Tokens, skipped: int) -> Tokens:
    """The same example without its first tokens; its answer need not end where the completion does."""
    return Tokens(tokens.input_ids[skipped:-1], tokens.label_ids[:-1])


_ONES: Mapping[str, One] = {
    "pooled": pooled,
    "scratch": from_scratch,
    "zero_shot": zero_shot,
    "few_shot": few_shot,
}
