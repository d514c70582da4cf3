"""Model cards: a ``README.md`` beside each adapter, with its purpose, its scores, and how to load it."""

import json
from pathlib import Path

import yaml

from gaisnet.adapters.full import FullSpec
from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.tuning import AdapterSpec
from gaisnet.config import Config, EdgeSettings
from gaisnet.runs.summary import Score, Summary

CARD_NAME = "README.md"
_CAUSAL = """```python
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained({base})
```"""
_CLASSIFIER = """```python
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base}, num_labels={num_classes}, ignore_mismatched_sizes=True)
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```"""
_ON_BASE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("where/it/is/now")
model = PeftModel.from_pretrained(base, "path/of/this/folder")
```"""
_FULL = """```python
from safetensors.torch import load_file

model.load_state_dict(load_file("path/of/this/folder/model.safetensors"), strict=False)
```

`model` is the base model, made with {num_classes} classes."""
_PROMPTS = "`prompts.safetensors` holds the rows that each layer sees besides its own (VPT-deep); peft has none such."


def render_card(name: str, spec: AdapterSpec, base: str, reads_text: bool, config: Config, summary: Summary) -> str:
    """Render the card of an adapter, Markdown under a header of YAML.

    Args:
        name: Name of the adapter: its domain, or ``merged``.
        spec: Its shape.
        base: The base model, a hub id or an absolute path.
        reads_text: Whether that is a model of text.
        config: The run's configuration.
        summary: The measurements so far; the figures are those of the last cycle.
    """
    parts = [
        f"---\n{yaml.safe_dump(_header(spec, base, config), sort_keys=False)}---",
        f"# {name}",
        _about(name, base, config),
        "## How it was trained",
        _training(spec, config, summary),
        "## How good it is",
        _figures(name, config, summary),
        "## How to load it",
        _loading(spec, base, reads_text),
        *([_if_moved(spec, base, config)] if _is_folder(base) else []),
    ]
    return "\n\n".join(parts) + "\n"


def _is_folder(base: str) -> bool:
    return Path(base).is_absolute()


def _header(spec: AdapterSpec, base: str, config: Config) -> dict[str, object]:
    """Return fields for the hub; it takes no path for a base model."""
    known: dict[str, object] = {} if _is_folder(base) else {"base_model": base}
    known["library_name"] = "transformers" if isinstance(spec, PromptSpec | FullSpec) else "peft"
    return {**known, "license": config.adapters.licence or "unknown", "tags": ["gaisnet", config.adapters.kind]}


def _about(name: str, base: str, config: Config) -> str:
    domains = {edge.domain: edge for edge in config.learning_edges()}
    licence = config.adapters.licence or "unknown: ask whoever trained it, and see the licence of the base model"
    asked = config.model.foundation
    loaded = f", loaded from `{base}`" if asked != base else ""
    lines = [f"- Base model: `{asked}`{loaded}", f"- Licence: {licence}"]
    if name in domains:
        lines += [f"- Domain: {name}", *_task(domains[name])]
    else:
        lines += [f"- One adapter out of those of {len(domains)} domains: {', '.join(domains)}"]
    return "\n".join(lines)


def _task(edge: EdgeSettings) -> list[str]:
    """Return the public description of the task, quoted so that it stays on its line."""
    told = {"Task template": edge.template, "Labels": list(edge.labels) or None}
    return [f"- {what}: `{json.dumps(said, ensure_ascii=False)}`" for what, said in told.items() if said is not None]


def _training(spec: AdapterSpec, config: Config, summary: Summary) -> str:
    tune, devices = config.fine_tune, [device for _, device in config.each_device()]
    num_local = sum(device.mode == "local" for device in devices)
    cycles = len(summary.cycles) - 1
    return (
        f"By hybrid federated split learning with GaisNet: {cycles} cycles over {len(config.edges)} edges with "
        f"{len(devices) - num_local} split and {num_local} local devices, whose examples did not leave them. "
        f"{tune.edge_rounds} edge rounds a cycle, {tune.local_epochs} passes over the examples a round, batches of "
        f"{tune.batch_size}, AdamW with a learning rate of {tune.learning_rate}; {_shape(spec)}; seed {config.seed}."
    )


def _shape(spec: AdapterSpec) -> str:
    layers = f"layers {min(spec.layers)} to {max(spec.layers)}"
    if isinstance(spec, PromptSpec):
        return f"deep prompts of {spec.num_rows} rows in {layers}"
    if isinstance(spec, FullSpec):
        return f"all weights of {layers}"
    return f"LoRA of rank {spec.rank} and alpha {spec.alpha} on {', '.join(spec.targets)} of {layers}"


def _figures(name: str, config: Config, summary: Summary) -> str:
    """Return a table of scores; an edge that was away has none in that cycle."""
    first, last = summary.cycles[0], summary.cycles[-1]
    if len(summary.cycles) == 1:
        return "It has not learned anything yet."
    own = name in {edge.domain for edge in config.learning_edges()}
    scores = {domain: score for domain, score in last.foundation.items() if domain == name} if own else last.merged
    if not scores:
        return "It was not scored in the last cycle."
    lines = ["| domain | before training | with this adapter |", "|---|---|---|"]
    lines += [
        f"| {domain} | {_said(first.foundation.get(domain))} | {_said(score)} |" for domain, score in scores.items()
    ]
    return "\n".join(lines) + "\n\nOn examples that devices held out; an answer is right if it is so to the letter."


def _said(score: Score | None) -> str:
    if score is None:
        return "not scored"
    return f"{score.accuracy:.1%} of {score.num_examples}, loss {score.loss:.3f}"


def _loading(spec: AdapterSpec, base: str, reads_text: bool) -> str:
    if isinstance(spec, PromptSpec):
        return _PROMPTS
    if isinstance(spec, FullSpec):
        return _FULL.format(num_classes=spec.num_classes)
    if not spec.num_classes:
        return _CAUSAL.format(base=json.dumps(base, ensure_ascii=False))
    auto = "AutoModelForSequenceClassification" if reads_text else "AutoModelForImageClassification"
    return _CLASSIFIER.format(auto=auto, base=json.dumps(base, ensure_ascii=False), num_classes=spec.num_classes)


def _if_moved(spec: AdapterSpec, base: str, config: Config) -> str:
    """Return advice for a machine that lacks the base model's folder."""
    said = f"The base model is a folder of the machine that this was trained on, `{base}`."
    if config.model.foundation != base:
        said += f" GaisNet has made it out of `{config.model.foundation}`, and makes it again where it loads that."
    if isinstance(spec, PromptSpec | FullSpec):
        return said
    said += " Elsewhere, put its present place under `base_model_name_or_path` in `adapter_config.json`"
    return f"{said}." if spec.num_classes else f"{said}, or load it on the base model:\n\n{_ON_BASE}"
