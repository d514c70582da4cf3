"""Tiny models with random weights, and a tiny network of them: real parts, small enough for every test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from gaisnet.config import Config, parse_config
from gaisnet.models.foundation import Foundation
from gaisnet.tiers.examples import DeviceData, Example

NUM_LAYERS = 6
VOCAB = 300


def tiny_model(family: str = "llama", tied: bool = True, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A decoder of a family with six layers of width 32."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    config = AutoConfig.for_model(family, **{**settings, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False).eval()
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_foundation(**changes: Any) -> Foundation:
    """A foundation model that needs no file."""
    return Foundation("tiny", tiny_model(**changes), tiny_tokenizer())


def save_tiny_foundation(folder: Path, **changes: Any) -> Path:
    """The same as a folder that ``load_foundation`` reads."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_raw_config(**changes: Any) -> dict[str, Any]:
    """A run of two edges with three devices each that takes about a second."""
    raw: dict[str, Any] = {
        "seed": 3,
        "cycles": 2,
        "model": {"foundation": "tiny", "context": 48},
        "domain": {"precision": "int8", "keep_layers": 5},
        "adapters": {"rank": 2, "alpha": 4, "first_layer": 4},
        "relay": {"rank": 2, "sequences": 8, "tokens": 12, "epochs": 1, "batch_size": 4},
        "fine_tune": {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.01},
        "absorb": {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 0.5},
        "edges": [tiny_edge("north", "shapes"), tiny_edge("south", "tastes")],
    }
    return {**raw, **changes}


def tiny_edge(name: str, domain: str) -> dict[str, Any]:
    """Two split devices with different cuts and a local one."""
    return {
        "name": name,
        "domain": domain,
        "template": "Is {text} so?",
        "labels": ["yes", "no"],
        "devices": [
            {"name": f"{name}-a", "mode": "split", "head_layers": 1},
            {"name": f"{name}-b", "mode": "split", "head_layers": 2},
            {"name": f"{name}-c", "mode": "local"},
        ],
    }


def tiny_config(**changes: Any) -> Config:
    """``tiny_raw_config``, checked."""
    return parse_config(tiny_raw_config(**changes))


def tiny_data(config: Config, num_train: int = 5, num_test: int = 3) -> dict[str, DeviceData]:
    """Different private words for every device, by device."""
    return {
        device.name: DeviceData(
            tuple(_example(device.name, "train", i) for i in range(num_train)),
            tuple(_example(device.name, "test", i) for i in range(num_test)),
        )
        for _, device in config.each_device()
    }


def _example(device: str, split: str, number: int) -> Example:
    secret = f"{device} {split} secret {'x' * (number % 3)}{number}"
    return Example(f"Is {secret} so?", " yes" if number % 2 else " no")
