"""Tiny models with random weights, and a tiny network of them: real parts, small enough for every test."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from gaisnet.config import Config, DevicePrecision
from gaisnet.config.file import parse_config
from gaisnet.data.examples import DeviceData, Example, Labelled
from gaisnet.models.families import Decoder
from gaisnet.models.foundation import Foundation
from gaisnet.row_quant import from_int4, from_int8, to_int4, to_int8

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
        "pad_token_id": None,  # torch would make its embedding zero, and so a tied head could never write it
    }
    config = AutoConfig.for_model(family, **{**settings, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False).eval()
    return model


def tiny_encoder(family: str, num_classes: int = 3, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """An encoder with a classifier, six layers of width 32 and weights large enough for every difference to be seen.

    Nothing of it is zero, nor are its norms the identity, so that none of it can be forgotten unnoticed. A ViT takes
    images of 12 by 8 pixels in three colours, which are six patches and so seven rows.
    """
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_labels": num_classes,
        **({"image_size": [12, 8], "patch_size": 4} if family == "vit" else {"vocab_size": VOCAB}),
    }
    config = AutoConfig.for_model(family, **{**settings, **changes})
    made_for: Any = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    model: PreTrainedModel = made_for.from_config(config)
    model.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        around = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        sharp = any(word in name for word in ("query", "key", "q_proj", "k_proj", "embeddings"))
        spread = 0.4 if sharp else 0.1  # attention is not even, and does not drown what a row was before
        parameter.data = around + spread * torch.randn(parameter.shape, generator=generator)
    return model


def tiny_inputs(family: str, num: int = 3, length: int = 7, seed: int = 7) -> torch.Tensor:
    """Images [num, 3, 12, 8], or token ids [num, length]."""
    generator = torch.Generator().manual_seed(seed)
    if family == "vit":
        return torch.randn(num, 3, 12, 8, generator=generator)
    return torch.randint(1, VOCAB, (num, length), generator=generator)


def round_weights(model: PreTrainedModel, layers: Iterable[int], precision: DevicePrecision) -> PreTrainedModel:
    """Embeddings, vocabulary head and some layers of a model as they are in few bits, widened again, in place."""
    decoder = Decoder(model)
    parts = [decoder.embed_tokens, decoder.lm_head, *(decoder.layers[index] for index in layers)]
    matrices = {id(p): p for part in parts for p in part.parameters() if p.ndim == 2}  # a tied one once
    for weight in matrices.values() if precision != "float32" else ():
        width = weight.shape[1]
        weight.data = from_int8(*to_int8(weight)) if precision == "int8" else from_int4(*to_int4(weight), width)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def tiny_bert_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, [CLS] before a text and [SEP] behind it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)} | {"[CLS]": 256, "[SEP]": 257, "[PAD]": 258}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 256), ("[SEP]", 257)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]")


def tiny_encoder_foundation(family: str, **changes: Any) -> Foundation:
    """An encoder that needs no file; a ViT has no tokenizer."""
    return Foundation("tiny", tiny_encoder(family, **changes), tiny_bert_tokenizer() if family == "bert" else None)


def save_tiny_encoder(folder: Path, family: str, **changes: Any) -> Path:
    """The same as a folder that ``load_foundation`` reads; what was made for a task is among it."""
    tiny_encoder(family, **changes).save_pretrained(folder)
    if family == "bert":
        tiny_bert_tokenizer().save_pretrained(folder)
    return folder


def tiny_foundation(**changes: Any) -> Foundation:
    """A foundation model that needs no file."""
    return Foundation("tiny", tiny_model(**changes), tiny_tokenizer())


def save_tiny_foundation(folder: Path, **changes: Any) -> Path:
    """The same as a folder that ``load_foundation`` reads."""
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


_GGUF_NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


def write_tiny_gguf(path: Path, model: PreTrainedModel, code: str = "F32", merges: tuple[str, ...] = ("Ġ y",)) -> Path:
    """A Llama as a GGUF file, its matrices in ``code``, with a tokenizer of bytes and one merge."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    _add_gguf_tokenizer(writer, config.vocab_size, merges)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_gguf_tensor(writer, name.removesuffix(".weight"), tensor, config, code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_gguf_tokenizer(writer: gguf.GGUFWriter, num_tokens: int, merges: tuple[str, ...]) -> None:
    vocab = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=lambda token: vocab[token]), "Ġy"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(num_tokens - len(tokens))])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * (num_tokens - 256))
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)


def _add_gguf_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, config: Any, code: str) -> None:
    block = ""
    if name.startswith("model.layers."):
        _, _, number, name = name.split(".", 3)
        block = f"blk.{number}."
    if name.endswith(("q_proj", "k_proj")):  # llama.cpp turns pairs of neighbours where transformers turns halves
        num_heads = config.num_attention_heads if name.endswith("q_proj") else config.num_key_value_heads
        halves = tensor.reshape(num_heads, 2, -1, tensor.shape[-1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    numbers = tensor.numpy().astype(np.float32)
    kind = gguf.GGMLQuantizationType[code if numbers.ndim == 2 else "F32"]
    writer.add_tensor(f"{block}{_GGUF_NAMES[name]}.weight", gguf.quants.quantize(numbers, kind), raw_dtype=kind)


def tiny_raw_config(**changes: Any) -> dict[str, Any]:
    """A run of two edges with three devices each that takes about a second."""
    raw: dict[str, Any] = {
        "seed": 3,
        "cycles": 2,
        "model": {"foundation": "tiny", "context": 48},
        "domain": {"precision": "int8", "keep_layers": 5},
        "adapters": {"rank": 2, "alpha": 4, "first_layer": 4},
        "relay": {"rank": 2, "sequences": 16, "tokens": 12},
        "fine_tune": {"local_epochs": 1, "batch_size": 4, "learning_rate": 0.01},
        "absorb": {"retention_windows": 2, "retention_tokens": 16, "max_retention_increase": 0.5},
        "edges": [tiny_edge("north", "shapes"), tiny_edge("south", "tastes")],
    }
    return {**raw, **changes}


def tiny_edge(name: str, domain: str, travelling: str = "") -> dict[str, Any]:
    """Two split devices with different cuts and a local one; ``travelling``: letters of those for the last mile."""
    kinds: dict[str, dict[str, Any]] = {
        "a": {"mode": "split", "head_layers": 1},
        "b": {"mode": "split", "head_layers": 2},
        "c": {"mode": "local"},
    }
    return {
        "name": name,
        "domain": domain,
        "template": "Is {text} so?",
        "labels": ["yes", "no"],
        "devices": [
            {"name": f"{name}-{letter}", **kind, "activations_to": "cloud" if letter in travelling else "edge"}
            for letter, kind in kinds.items()
        ],
    }


def tiny_newcomer(name: str, domain: str, follows: str) -> dict[str, Any]:
    """An edge with three devices that has nothing to learn from."""
    return {**tiny_edge(name, domain), "follows": follows}


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


def write_tiny_run(folder: Path, **changes: Any) -> Path:
    """A configuration file with everything that it names: a foundation model and a data folder for every device."""
    save_tiny_foundation(folder / "foundation", initializer_range=0.1)
    raw = tiny_raw_config(**{"model": {"foundation": str(folder / "foundation"), "context": 48}, **changes})
    lines = {
        name: {split: [{"prompt": e.prompt, "completion": e.completion} for e in mine] for split, mine in _splits(data)}
        for name, data in tiny_data(parse_config(raw)).items()
    }
    return _write_run(folder, raw, lines)


def _splits(data: DeviceData[Any]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    return ("train", data.train), ("test", data.test)


def _write_run(folder: Path, raw: dict[str, Any], lines: dict[str, dict[str, list[dict[str, Any]]]]) -> Path:
    """A folder of JSONL for every device, by split, and a configuration that names them."""
    for name, splits in lines.items():
        (folder / "data" / name).mkdir(parents=True)
        for split, rows in splits.items():
            text = "\n".join(map(json.dumps, rows)) + "\n"
            (folder / "data" / name / f"{split}.jsonl").write_text(text, encoding="utf-8")
    for edge in raw["edges"]:
        for device in edge["devices"]:
            device["data"] = f"data/{device['name']}"
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


SHAPES, TASTES = ["round", "square", "long"], ["sweet", "sour", "salty", "bitter"]


def encoder_raw_config(kind: str = "lora", **changes: Any) -> dict[str, Any]:
    """``tiny_raw_config`` for an encoder: two domains with different numbers of classes, split and local devices."""
    edges = [{**tiny_edge("north", "shapes"), "labels": SHAPES}, {**tiny_edge("south", "tastes"), "labels": TASTES}]
    raw: dict[str, Any] = {
        "domain": {"precision": "float32"},
        "adapters": {"kind": kind, "rank": 2, "alpha": 4, "num_prompts": 3, "first_layer": 4},
        "fine_tune": {"local_epochs": 4, "batch_size": 4, "learning_rate": 0.01},
        "edges": edges,
    }
    return tiny_raw_config(**{**raw, **changes})


def encoder_data(config: Config, family: str, num_train: int = 6, num_test: int = 4) -> dict[str, DeviceData[Labelled]]:
    """Texts whose end tells their class, or images whose brightness does; different ones for every device."""
    data = {}
    for number, (edge, device) in enumerate(config.each_device()):
        train, test = (
            tuple(_labelled(family, edge.labels, seed, device.name) for seed in range(first, first + num))
            for first, num in ((100 * number, num_train), (100 * number + 50, num_test))
        )
        data[device.name] = DeviceData(train, test)
    return data


def _labelled(family: str, labels: tuple[str, ...], seed: int, owner: str) -> Labelled:
    which = seed % len(labels)
    if family == "vit":
        return Labelled(0.3 * tiny_inputs("vit", 1, seed=seed)[0] + which - 1.0, labels[which])
    return Labelled(f"{owner} {seed} " + "abcd"[which] * (3 + seed % 4), labels[which])


def write_tiny_bert_run(folder: Path, **changes: Any) -> Path:
    """A configuration file with everything that it names, like ``write_tiny_run``, of a BERT that classifies."""
    save_tiny_encoder(folder / "foundation", "bert")
    raw = encoder_raw_config(**{"model": {"foundation": str(folder / "foundation"), "context": 48}, **changes})
    lines = {
        name: {split: [{"text": e.input, "label": e.label} for e in mine] for split, mine in _splits(data)}
        for name, data in encoder_data(parse_config(raw), "bert").items()
    }
    return _write_run(folder, raw, lines)


def write_tiny_vit_run(folder: Path, **changes: Any) -> Path:
    """The same of a ViT: one edge, a split and a local device with pictures, and public ones."""
    save_tiny_encoder(folder / "foundation", "vit")
    raw = encoder_raw_config("prompts", cycles=1, **changes)
    raw["model"] = {"foundation": str(folder / "foundation"), "public_inputs": "public/inputs.jsonl"}
    devices = [{"name": "a", "head_layers": 1, "data": "a"}, {"name": "b", "mode": "local", "data": "b"}]
    raw["edges"] = [{"name": "north", "domain": "shapes", "labels": SHAPES, "devices": devices}]
    for name in ("a", "b", "public"):
        (folder / name).mkdir()
        lines = []
        for i in range(6):
            _write_picture(folder / name / f"{i}.png", 10 * i + "ab public".index(name), 90 * (i % 3))
            label = {} if name == "public" else {"label": SHAPES[i % 3]}
            lines.append(json.dumps({"image": f"{i}.png", **label}))
        for split in ("inputs",) if name == "public" else ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def _write_picture(path: Path, seed: int, brightness: int) -> None:
    noise = torch.randint(0, 60, (12, 8, 3), generator=torch.Generator().manual_seed(seed))
    levels = (noise + brightness).to(torch.uint8).numpy()
    Image.fromarray(levels).save(path)
