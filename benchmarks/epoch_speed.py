"""Seconds of a fine-tuning epoch: GaisNet's split fine-tuning against plain LoRA on all layers of the whole model.

Both learn from the same medical examples with the same batch size, on the same machine, in turn, in one process. The
figure of GaisNet includes the device heads and the activation cache. Run: python benchmarks/epoch_speed.py
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # for both, as the command has it
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.devices import load_domains, public_text
from gaisnet.data.examples import Tokens, tokenize
from gaisnet.engines.local import build_network
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import Foundation, load_foundation


def config_for(examples: int, epochs: int) -> Config:
    """One edge with three split devices of different cuts; the demo's settings otherwise."""
    devices = [{"name": f"clinic-{i}", "head_layers": i} for i in (1, 2, 3)]
    return parse_config(
        {
            "data": {"train_examples": examples, "test_examples": 63},
            "relay": {"enabled": False},
            "fine_tune": {"local_epochs": epochs},
            "edges": [{"name": "hospital", "domain": "medical", "devices": devices}],
        }
    )


def seconds_of_gaisnet(config: Config, foundation: Foundation) -> float:
    """Smashed data, cache and all epochs of what learns; the network is set up before, devices' parts included."""
    domain = load_domains(config)["medical"]
    shapes = {"medical": TaskTemplate(domain.template, domain.labels)}
    network = build_network(config, foundation, shapes, domain.devices, public_text(config.absorb))
    network.install()
    network.evaluate()  # hands the devices their parts
    started = time.perf_counter()
    network.fine_tune()
    return time.perf_counter() - started


def seconds_of_plain_lora(config: Config, foundation: Foundation) -> float:
    """LoRA on every linear module of every layer, as transformers and peft have it."""
    domain = load_domains(config)["medical"]
    examples = [example for data in domain.devices.values() for example in data.train]
    tokens = tokenize(examples, foundation.tokenizer, config.model.context, "pooled")
    settings = config.adapters
    lora = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(settings.targets))
    model = get_peft_model(foundation.model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    started = time.perf_counter()
    for _ in range(config.fine_tune.local_epochs):
        order = torch.randperm(len(tokens)).tolist()
        for first in range(0, len(order), config.fine_tune.batch_size):
            batch = [tokens[i] for i in order[first : first + config.fine_tune.batch_size]]
            optimizer.zero_grad()
            plain_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return time.perf_counter() - started


def plain_loss(model: PreTrainedModel, batch: list[Tokens]) -> torch.Tensor:
    """The causal language model's own loss on a padded batch."""
    ids = [torch.tensor([*t.input_ids, t.label_ids[-1]]) for t in batch]
    labels = [torch.tensor([-100] * (len(t.input_ids) + 1 - len(t.label_ids)) + list(t.label_ids)) for t in batch]
    input_ids = pad_sequence(ids, batch_first=True)
    mask = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True)
    loss: torch.Tensor = model(
        input_ids=input_ids, attention_mask=mask, labels=pad_sequence(labels, batch_first=True, padding_value=-100)
    ).loss
    return loss


def main() -> None:
    """Print a line per round and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=630)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = config_for(arguments.examples, arguments.epochs)
    ratios = []
    for number in range(arguments.rounds):
        ours = seconds_of_gaisnet(config, load_foundation(config.model)) / arguments.epochs
        plain = seconds_of_plain_lora(config, load_foundation(config.model, plain=True)) / arguments.epochs
        ratios.append(plain / ours)
        print(f"round {number + 1}: plain LoRA {plain:.1f} s, GaisNet {ours:.1f} s an epoch, {ratios[-1]:.2f} times")  # noqa: T201
    print(f"median {statistics.median(ratios):.2f} times, min {min(ratios):.2f}, max {max(ratios):.2f}")  # noqa: T201


if __name__ == "__main__":
    main()
