"""Checks of a pretrained model's files before any of them is loaded; each fault has a clear error.

transformers would raise from deep inside, load something else, or ask the user whether to run foreign code.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gaisnet.errors import ModelError
from gaisnet.models.families import refuse_family
from gaisnet.strict_json import loads

DO = "give a hub id, a model folder or a .gguf file"
AGAIN = "download the model again"
CONVERT = (
    "convert it where you trust its author, for unpickling runs code: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), and the tokenizer beside it"
)
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "tf_model.h5", "flax_model.msgpack")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "spiece*", "merges.txt")
_POINTER = b"version https://git-lfs"


def check_folder(folder: Path, asked: str) -> None:
    """Raise ``ModelError`` for a folder that holds no model: an adapter, pointers, a .gguf file, or nothing."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and _starts_with(path, _POINTER):
            found = f"'{path.name}' is a pointer of Git LFS, not the file itself"
            raise ModelError(asked, found, "run 'git lfs pull' in its folder")
    if (folder / _ADAPTER).is_file():
        found = f"it holds an adapter ({_ADAPTER}){_base_of(folder)}, not a model alone"
        raise ModelError(asked, found, "give the model that the adapter belongs to, or one it was merged into")
    if not (folder / _CONFIG).is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        do = f"give the file, '{ggufs[0]}'" if ggufs else DO
        raise ModelError(asked, f"cannot be loaded (the folder has no {_CONFIG})", do)
    _object_in(folder / _CONFIG, asked)


def check_config(raw: Mapping[str, Any], asked: str) -> None:
    """Raise ``ModelError`` for a model that needs foreign code, has no supported family, or is quantized."""
    if raw.get("auto_map"):
        found = f"it is made for code of its author's own ({_CONFIG} has 'auto_map'), which GaisNet never runs"
        raise ModelError(asked, found, "use a model that transformers has without it")
    family = raw.get("model_type")
    if not isinstance(family, str):
        raise ModelError(asked, f"its {_CONFIG} names no model_type", "use a folder as transformers saves it")
    refuse_family(family, asked)
    quantised = raw.get("quantization_config") or raw.get("compression_config")
    if quantised:
        found = f"its weights are quantised ({_method(quantised)}), and adapters are trained on weights that are not"
        do = "use the model that it was made from, in float32, bfloat16 or float16 (domain.precision rounds layers)"
        raise ModelError(asked, found, do)


def check_weights(folder: Path, asked: str) -> None:
    """Raise ``ModelError`` unless all weights are there, in whole safetensors files."""
    for name in _files_of_weights(folder, asked):
        if not (folder / name).is_file():
            raise ModelError(asked, f"'{name}' is missing, which {_INDEX} names", AGAIN)
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(asked, f"'{name}' is damaged or not whole ({error})", AGAIN) from error


def check_tokenizer_files(folder: Path, asked: str) -> None:
    """Raise ``ModelError`` if a folder has no tokenizer file."""
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise ModelError(asked, "its folder has no tokenizer (tokenizer.json)", "put the tokenizer's files there")


def _files_of_weights(folder: Path, asked: str) -> list[str]:
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = _object_in(folder / _INDEX, asked).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ModelError(asked, f"{_INDEX} has no weight_map", AGAIN)
        return sorted(set(shards.values()))
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        found = f"its weights are pickled ('{pickled[0]}'), and GaisNet reads safetensors only"
        raise ModelError(asked, found, CONVERT)
    raise ModelError(asked, f"its folder has no weights ({_WEIGHTS})", AGAIN)


def _object_in(path: Path, asked: str) -> dict[str, Any]:
    try:
        found = loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(asked, f"cannot be loaded ({path.name} is not valid JSON: {error})", AGAIN) from error
    if not isinstance(found, dict):
        raise ModelError(asked, f"cannot be loaded ({path.name} is no JSON object)", AGAIN)
    return found


def _method(quantised: Any) -> str:
    """Return the name of a quantization, such as 'awq'; old bitsandbytes files have none."""
    if not isinstance(quantised, Mapping):
        return "quantization_config"
    if any(quantised.get(f"{key}load_in_{bits}bit") for key in ("", "_") for bits in (4, 8)):
        return "bitsandbytes"
    return str(quantised.get("quant_method") or quantised.get("format") or "quantization_config")


def _base_of(folder: Path) -> str:
    try:
        base = loads((folder / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" of '{base}'" if isinstance(base, str) else ""


def _starts_with(path: Path, beginning: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(beginning)) == beginning
