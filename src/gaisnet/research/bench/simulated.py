"""A network of any size in one process with a tiny random model: real tiers, and bytes on every link."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.devices import retention_text
from gaisnet.data.examples import DeviceData, Example
from gaisnet.engines.local import NoPublishers, Tiers, build_tiers
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.families import ATTENTION
from gaisnet.models.foundation import Foundation
from gaisnet.models.frozen import freeze_linears
from gaisnet.progress import silent
from gaisnet.transport.ledger import Ledger

DEVICES_PER_EDGE = 100
_TRAIN, _TEST = 2, 1
_NUM_BYTES = 256
_RETENTION_CHARS = 1000


def simulate(num_devices: int) -> Tiers:
    """Build cloud, edges and split devices, a fixed number per edge, with two training examples each."""
    config = _config(num_devices)
    shapes = {edge.domain: TaskTemplate(None, ()) for edge in config.edges}
    data = {device.name: _data(device.name) for _, device in config.each_device()}
    text = retention_text(_RETENTION_CHARS)
    return build_tiers(config, _foundation(config.seed), shapes, data, text, silent, Ledger, NoPublishers())


def equip(tiers: Tiers) -> None:
    """Send every device its part of the model; edges have theirs."""
    edges = list(tiers.edges.values())
    for number, name in enumerate(tiers.devices):
        edges[number // DEVICES_PER_EDGE].equip_device(name)


def num_edges(num_devices: int) -> int:
    """Return the number of edges for this many devices."""
    return -(-num_devices // DEVICES_PER_EDGE)


def _config(num_devices: int) -> Config:
    names = [f"device-{number}" for number in range(num_devices)]
    edges = [
        {
            "name": f"edge-{number}",
            "domain": f"domain-{number}",
            "devices": [{"name": name} for name in names[number * DEVICES_PER_EDGE : (number + 1) * DEVICES_PER_EDGE]],
        }
        for number in range(num_edges(num_devices))
    ]
    return parse_config(
        {
            "model": {"foundation": "random", "context": 32},
            "adapters": {"rank": 2, "alpha": 4, "first_layer": 4},
            "relay": {"enabled": False, "tokens": 8},
            "fine_tune": {"local_epochs": 1, "anchor_sequences": 4},
            "absorb": {"retention_windows": 2, "retention_tokens": 16},
            "edges": edges,
        }
    )


def _data(name: str) -> DeviceData:
    examples = [Example(f"{name} {number}?", " yes" if number % 2 else " no") for number in range(_TRAIN + _TEST)]
    return DeviceData(tuple(examples[:_TRAIN]), tuple(examples[_TRAIN:]))


def _foundation(seed: int) -> Foundation:
    """Make a Llama of six layers of width 32 that reads bytes."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=_NUM_BYTES + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=_NUM_BYTES,
        eos_token_id=_NUM_BYTES + 1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation=ATTENTION)
    model.requires_grad_(False).eval()
    freeze_linears(model)
    return Foundation("random", model, _tokenizer())


def _tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of bytes and two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate((*letters, "<s>", "</s>"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
