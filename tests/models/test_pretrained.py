"""Checkpoints that are broken, quantised, pickled, or somebody's own code are refused by name, with what to do.

And what a model's files may not decide: whether code runs, and which kernel computes attention.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoConfig

from gaisnet.config.learning import ModelSettings
from gaisnet.errors import ModelError
from gaisnet.models.families import empty_decoder
from gaisnet.models.foundation import Foundation, load_foundation
from tests.tiny import save_tiny_encoder, save_tiny_foundation, tiny_model, tiny_tokenizer

Edit = Callable[[Path], object]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a decoder, to be copied."""
    return save_tiny_foundation(tmp_path_factory.mktemp("whole"), initializer_range=0.1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path, **changes: object) -> Foundation:
    return load_foundation(ModelSettings.model_validate({"foundation": str(folder), "context": 48, **changes}))


def config_says(**changes: object) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return edit


def quantised(**settings: object) -> Edit:
    return config_says(quantization_config=settings)


def writes(name: str, text: str) -> Edit:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def remove(pattern: str) -> Edit:
    def edit(folder: Path) -> None:
        for path in folder.glob(pattern):
            path.unlink()

    return edit


def both(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for each in edits:
            each(folder)

    return edit


def in_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_finite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def an_adapter(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    writes("adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}')(folder)


def added_tokens(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(60)])
    tokenizer.save_pretrained(folder)


def only_a_gguf(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "model.Q4_0.gguf").touch()


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
BAD: dict[str, tuple[Edit, str]] = {
    "AWQ": (quantised(quant_method="awq", bits=4, group_size=16), r"quantised \(awq\).*; use the model that it was"),
    "GPTQ": (quantised(quant_method="gptq", bits=4, group_size=16), r"quantised \(gptq\).*; use the model that it was"),
    "bitsandbytes": (quantised(load_in_4bit=True), r"quantised \(bitsandbytes\).*; use the model that it was"),
    "FP8": (quantised(quant_method="fp8"), r"quantised \(fp8\).*; use the model that it was"),
    "compressed-tensors": (quantised(quant_method="compressed-tensors"), r"quantised \(compressed-tensors\)"),
    "old compressed-tensors": (config_says(compression_config={"format": "int-quantized"}), "quantised .int-quantized"),
    "a pointer": (writes("model.safetensors", POINTER), "'model.safetensors' is a pointer of Git LFS.*; run 'git lfs"),
    "a pointer to a tokenizer": (writes("tokenizer.json", POINTER), "'tokenizer.json' is a pointer of Git LFS"),
    "no weights": (remove("model.safetensors"), "no weights .*; download the model again"),
    "a missing shard": (in_shards, "'model-00002-of-00002.safetensors' is missing, which model.safetensors.index.json"),
    "a broken index": (
        both(in_shards, writes("model.safetensors.index.json", "[]")),
        "index.json is no JSON object",
    ),
    "pickled": (pickled, r"pickled \('pytorch_model.bin'\).*safetensors only; convert it where you trust its author"),
    "no tokenizer": (
        remove("tokenizer*"),
        "no tokenizer .*; put the tokenizer's files there",
    ),
    "tokens without a row": (added_tokens, "'<extra42>' as token 300, and its embedding only 300 rows; save it again"),
    "an adapter": (an_adapter, "an adapter .* of 'some/base', not a model alone; give the model that the adapter"),
    "a GGUF file in a folder": (only_a_gguf, "no config.json.*; give the file, '.*model.Q4_0.gguf'"),
    "not JSON": (writes("config.json", "{"), "config.json is not valid JSON.*; download the model again"),
    "not an object": (writes("config.json", "[]"), "config.json is no JSON object.; download the model again"),
    "a key twice": (writes("config.json", '{"a": 1, "a": 2}'), 'config.json is not valid JSON: the key "a" is given'),
    "deep": (writes("config.json", "[" * 100_000), "config.json is not valid JSON: values nest deeper"),
    "foreign code": (
        config_says(auto_map={"AutoModelForCausalLM": "modeling_x.X"}, model_type="my_own"),
        "code of its author's own .config.json has 'auto_map'., which GaisNet never runs; use a model",
    ),
    "foreign code for a known family": (
        config_says(auto_map={"AutoConfig": "x.X"}),
        "'auto_map'., which GaisNet never",
    ),
    "NaN": (not_finite, "NaN or infinity in torch.float32, first in 'model.layers.2.mlp.down_proj.weight'; download"),
    "an unknown family": (
        config_says(model_type="brandnew9"),
        "its family 'brandnew9' is not supported; use a decoder",
    ),
    "no family": (config_says(model_type=None), "names no model_type; use a folder as transformers saves it"),
    "a list as family": (config_says(model_type=["llama"]), "names no model_type"),
    "another vocabulary": (
        config_says(vocab_size=200),
        r"'model.embed_tokens.weight' is \(300, 32\) in its weights and \(200, 32\) by its config.json",
    ),
    "another width": (config_says(hidden_size=64, head_dim=16), "in its weights and .* by its config.json"),
    "words for numbers": (config_says(num_hidden_layers="six"), "cannot be loaded"),
    "few positions": (
        config_says(max_position_embeddings=16),
        "made for 16 positions and model.context is 48; set model.context to 15 or less",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_cannot_be_used_is_refused_by_name(folder: Path, name: str) -> None:
    edit, told = BAD[name]
    edit(folder)
    with pytest.raises(ModelError, match=f"(?s)foundation model '{folder}': .*{told}"):
        load(folder)


def test_a_context_beyond_an_encoders_positions_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path, "bert", max_position_embeddings=40)
    with pytest.raises(ModelError, match="made for 40 positions and model.context is 48; set model.context to 40"):
        load(folder)
    assert load(folder, context=40).model.config.max_position_embeddings == 40


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"infinity in torch.float16, first in 'model.norm.weight'.*model.dtype"):
        load(folder, dtype="float16")
    assert load(folder).model.dtype == torch.float32


def test_a_special_token_without_a_row_does_no_harm_unless_a_chat_has_it(folder: Path) -> None:
    """As a padding token has it that was added to Llama-2 without a resize."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(60)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert len(load(folder).tokenizer) > 300
    tokenizer.chat_template = "{% for m in messages %}<unused59>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="'<unused59>' as token 317"):
        load(folder)


def test_a_configuration_does_not_choose_the_kernel_of_attention(folder: Path) -> None:
    """It could name one to be fetched from the hub, which is code."""
    config_says(attn_implementation="somebody/kernel")(folder)
    assert load(folder).model.config._attn_implementation == "sdpa"


def test_a_release_does_not_choose_the_kernel_of_attention() -> None:
    shape = {**tiny_model().config.to_dict(), "attn_implementation": "somebody/kernel"}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    assert config._attn_implementation == "somebody/kernel"
    assert empty_decoder(config).config._attn_implementation == "sdpa"


def test_no_file_of_a_model_is_imported(folder: Path) -> None:
    """Neither for a model nor for a tokenizer that names code of its own."""
    path, ran = folder / "tokenizer_config.json", folder / "ran"
    said = json.loads(path.read_text(encoding="utf-8"))
    said |= {"auto_map": {"AutoTokenizer": [None, "own.Own"]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(said), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')", encoding="utf-8")
    with suppress(ModelError):
        load(folder)
    assert not ran.exists()
