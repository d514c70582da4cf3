"""Sizes by arithmetic are those of real messages, and a message that cannot cross is refused before loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from gaisnet.config import Config, WireSettings
from gaisnet.config.file import parse_config
from gaisnet.config.learning import ModelSettings
from gaisnet.engines.sizes import check_sizes, planned_release
from gaisnet.errors import ConfigError, CutError, DataError
from gaisnet.messages import Chunk, ModelRelease
from gaisnet.models.foundation import read_shape
from gaisnet.models.recipe import Recipe
from gaisnet.models.release import restrict
from gaisnet.tiers.device.device import Device
from gaisnet.transport.codec import Codec
from tests.tiers.cohort import model_release
from tests.tiny import (
    encoder_raw_config,
    save_tiny_encoder,
    save_tiny_foundation,
    tiny_config,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
)

LLAMA_3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def shapes(release: ModelRelease) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in release.tensors.items()}


def large(**changes: Any) -> tuple[Config, PretrainedConfig]:
    """A run of a model with the shape of Llama 3 8B."""
    devices = [{"name": "clinic-a"}, {"name": "clinic-b", "head_layers": 2}]
    edges = [{"name": "hospital", "domain": "medical", "devices": devices}]
    return parse_config({"edges": edges, **changes}), AutoConfig.for_model("llama", **LLAMA_3_8B)


def num_frames(size_bytes: int, codec: Codec) -> int:
    return -(-size_bytes // codec.chunk_bytes)


@pytest.mark.parametrize(("precision", "kept"), [("float32", (0, 1, 2, 3, 4, 5)), ("int8", (0, 1, 3, 4, 5))])
def test_the_arithmetic_is_that_of_what_is_released(precision: str, kept: tuple[int, ...]) -> None:
    config = tiny_config(domain={"precision": precision, "keep_layers": list(kept)})
    planned = planned_release(config, tiny_model().config)
    real = model_release(config, Recipe(kept, tuple(i for i in kept if i in (2, 3)) if precision == "int8" else ()))
    assert shapes(planned) == shapes(real) and (planned.layers, planned.int8_layers) == (real.layers, real.int8_layers)
    codec = Codec(config.wire)
    assert abs(codec.pack(planned).size_bytes - codec.pack(real).size_bytes) <= 64
    assert all(tensor.is_meta for tensor in planned.tensors.values())


@pytest.mark.parametrize(
    ("limit", "num_chunks", "largest"), [(2**26, 479, 2**26), (2**31, 479, 2**26), (2**20, 30_663, 2**20)]
)
def test_a_model_of_8_billion_parameters_crosses_in_frames_that_fit(limit: int, num_chunks: int, largest: int) -> None:
    config, shape = large(wire={"max_message_bytes": limit}, domain={"precision": "float32", "keep_layers": None})
    codec, release = Codec(config.wire), planned_release(config, shape)
    assert sum(tensor.numel() for tensor in release.tensors.values()) == 8_030_261_248
    size = codec.pack(release).size_bytes
    assert size == pytest.approx(4 * 8_030_261_248, abs=2**16) and size <= config.wire.max_transfer_bytes
    assert num_frames(size, codec) == num_chunks
    assert codec.chunk_bytes < largest
    header = len(codec.encode(Chunk.from_bytes("f" * 64, num_chunks, "f" * 64, bytearray(8)))) - 8
    assert codec.chunk_bytes + header <= largest
    outer = codec.pack(restrict(release, (0, 1))).size_bytes
    assert 2**32 < outer <= config.wire.max_transfer_bytes  # a device's embeddings and vocabulary head: two limits


def test_half_of_its_numbers_in_int8_and_bfloat16_take_a_quarter() -> None:
    config, shape = large(model={"dtype": "bfloat16"}, domain={"precision": "int8", "keep_layers": None})
    size = Codec(config.wire).pack(planned_release(config, shape)).size_bytes
    assert 1.2e10 < size < 1.35e10


def test_a_release_that_cannot_cross_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    folder = save_tiny_foundation(tmp_path / "foundation")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    model: dict[str, Any] = {"foundation": str(folder), "context": 48}
    planned = planned_release(tiny_config(), read_shape(ModelSettings(**model)))
    needed = Codec(WireSettings()).pack(planned).size_bytes
    small = tiny_config(model=model, wire={"max_transfer_bytes": 2**16})
    found = (
        f"wire.max_transfer_bytes: is 65536 bytes, but the release of '.*foundation' takes {needed}; set it to {needed}"
    )
    with pytest.raises(ConfigError, match=found):
        check_sizes(small)
    check_sizes(tiny_config(model=model, wire={"max_transfer_bytes": needed}))


def test_an_encoder_has_an_arithmetic_too(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path / "vit", "vit")
    raw = encoder_raw_config(model={"foundation": str(folder), "context": 48}, wire={"max_transfer_bytes": 2**16})
    with pytest.raises(ConfigError, match=r"wire\.max_transfer_bytes: is 65536 bytes, but the release of"):
        check_sizes(parse_config(raw))


def test_a_configuration_that_does_not_fit_the_shape_is_refused_as_always() -> None:
    with pytest.raises(CutError, match="adapters.first_layer is 40"):
        planned_release(*large(adapters={"first_layer": 40}))


def test_a_device_whose_activations_could_not_cross_says_so_when_it_gets_its_model() -> None:
    config = tiny_config(wire={"max_transfer_bytes": 2**16, "smashed": "float32"})
    release = model_release(config, Recipe(tuple(range(6)), ()))
    (_, settings), *_ = config.each_device()
    few, many = (tiny_data(config, num_train=num)[settings.name] for num in (5, 40))
    Device(settings, config, tiny_tokenizer(), few).handle(release)
    device = Device(settings, config, tiny_tokenizer(), many)
    found = (
        r"device 'north-a': its train examples make \d+ rows of activations, \d+ bytes in float32; raise wire.max_tr"
    )
    with pytest.raises(DataError, match=found):
        device.handle(release)
