"""Baselines for a finished run, on its own examples: pooled data, each edge alone, from scratch, zero- and few-shot.

Each baseline is written into the run's summary and report as soon as it is measured, so a stopped measurement resumes
with the next one.
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
"""Number of examples in the prompt of ``few_shot``."""

_SCRATCH_LEARNING_RATE = 5e-4  # for all weights; LoRA's would be far too high

KINDS = tuple(name for name in Baselines.model_fields if name != "cycles")
"""All baselines, in the order of the summary."""

One = Callable[[Config, DomainData, int, int], float]
"""Measures one domain, given settings with the whole run's passes, examples, the number of a DM's layers, a seed."""


def measure_baselines(
    out: Path, progress: Progress = silent, kinds: Sequence[str] = KINDS, overrides: Sequence[str] = ()
) -> Summary:
    """Measure those of ``KINDS`` that the run in ``out`` lacks; its examples must be on this machine.

    Baselines of another number of cycles are dropped. ``overrides`` as for ``kept_config``.

    Raises:
        NothingToResume: There is no run.
        ConfigError: The run has not finished a cycle.
        GaisnetError: A model or the examples cannot be loaded, or the model is an encoder.
    """
    with RunFolder.resume(out) as folder:
        config, summary = kept_config(folder, overrides), kept_summary(folder)
        cycles, domains = len(summary.cycles) - 1, load_domains(config)
        learning = [edge.domain for edge in config.learning_edges()]
        if not cycles:
            raise ConfigError(f"baselines of '{out}'", "it has not finished a cycle", f"gaisnet run --resume {out}")
        read_config(config.model)  # refuse an encoder, which completes nothing
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
    """Return settings for training at once as long as the network trains over all cycles, to the nearest whole pass.

    The last mile starts anew in every cycle, so the last one counts, for its share of the examples.
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
    """Train every edge alone with its devices and its DM, without a relay; return accuracies by domain.

    They train for as many cycles, but nothing goes up or down in between. Newcomers are not trained.
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
    """Train LoRA on all layers of the FM with transformers' Trainer and peft."""
    task = _task(config, data)
    return _learned(adapted(task, False, seed), task, seed)


def from_scratch(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """Train a model of the FM's shape with a DM's number of layers from scratch."""
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
    """Return the accuracy after all passes. The learning rate falls to zero, the Trainer's default.

    Logits are computed for answers only, which is faster and gives the same losses.
    """
    train(model, replace(task, test=()), seed, "linear", answered)
    return accuracy(model.eval(), task.test)


def zero_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """Score the FM as it is on the examples' prompts."""
    return _asked(config, data, 0, seed)


def few_shot(config: Config, data: DomainData, num_layers: int, seed: int) -> float:
    """Score the FM as it is with some training examples before the prompt."""
    return _asked(config, data, SHOTS, seed)


def _task(config: Config, data: DomainData, learning_rate: float | None = None) -> Task:
    if learning_rate is not None:
        tune = config.fine_tune.model_copy(update={"learning_rate": learning_rate})
        config = config.model_copy(update={"fine_tune": tune})
    return Task.load(config, data)


def _asked(config: Config, data: DomainData, num_shots: int, seed: int) -> float:
    """Return test prompts as all contenders see them, and the shots before them, within the context."""
    foundation = load_foundation(config.model, plain=True)
    task = Task.load(config, data)
    shots = random.Random(seed).sample(task.pooled, min(num_shots, len(task.pooled)))
    opening, gap = opening_ids(foundation.tokenizer), continuing_ids(foundation.tokenizer, "\n\n")
    shown = [token for shot in shots for token in (*shot.input_ids[len(opening) :], *gap)]
    shown = [*opening, *shown] if shots else []
    skipped = len(opening) if shots else 0  # a text is opened once
    return accuracy(foundation.model, [_open_ended(tokens, skipped) for tokens in task.test], shown)


def _open_ended(tokens: Tokens, skipped: int) -> Tokens:
    """Return the same example without its first tokens; its answer may go on after the completion."""
    return Tokens(tokens.input_ids[skipped:-1], tokens.label_ids[:-1])


_ONES: Mapping[str, One] = {
    "pooled": pooled,
    "scratch": from_scratch,
    "zero_shot": zero_shot,
    "few_shot": few_shot,
}
