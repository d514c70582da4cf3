"""The only loader of pretrained models: configuration, weights and tokenizer, from a folder, the hub or a GGUF file.

No code of a model's author runs, weights are read from safetensors only, and attention is always PyTorch's own: a
configuration could name a kernel to download.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gaisnet.config.learning import CONTEXT_LIMIT
from gaisnet.errors import GaisnetError, ModelError
from gaisnet.models.families import ATTENTION, check_supported, family_of
from gaisnet.models.model_folder import (
    AGAIN,
    CONVERT,
    DO,
    check_config,
    check_folder,
    check_tokenizer_files,
    check_weights,
)

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
_LONGEST = 300  # characters of a third party's error message


def pretrained_config(source: str, asked: str) -> PretrainedConfig:
    """Load the configuration of a supported model, without its weights. Raises ``ModelError``.

    Args:
        source: A folder or a hub id.
        asked: Name of the model in errors.
    """
    if Path(source).is_dir():
        with _told(asked):
            check_folder(Path(source), asked)
    with _told(asked):
        raw, _ = PretrainedConfig.get_config_dict(source, trust_remote_code=False)
    check_config(raw, asked)
    with _told(asked):
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_supported(config, asked)
    return config


def pretrained_model(
    kind: Any, source: str, asked: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Any, list[str]]:
    """Load a model with its weights; also return names of weights missing in its files, which are random.

    Raises ``ModelError``.

    Args:
        kind: A class of transformers, or one of its Auto classes.
        source: A folder or a hub id.
        asked: Name of the model in errors.
        dtype: Dtype of the weights.
        changes: Changes to its configuration.
    """
    if Path(source).is_dir():
        check_weights(Path(source), asked)
    with _told(asked):
        model, report = kind.from_pretrained(
            source,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # so that they are reported below
            output_loading_info=True,
            **changes,
        )
    for name, stored, shape in sorted(report["mismatched_keys"]):
        found = f"'{name}' is {tuple(stored)} in its weights and {tuple(shape)} by its config.json"
        raise ModelError(asked, f"cannot be loaded ({found})", AGAIN)
    _check_finite(model, asked)
    return model, sorted(report["missing_keys"])


def pretrained_tokenizer(source: str, asked: str, do: str = DO) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises ``ModelError`` with the advice ``do``."""
    if Path(source).is_dir():
        check_tokenizer_files(Path(source), asked)
    with _told(asked, do, "its tokenizer cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return tokenizer


def from_gguf(gguf: Path, asked: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer from a GGUF file, dequantized to float32. Raises ``ModelError``."""
    with _told(asked, "check the file", "the GGUF file cannot be converted"):
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation=ATTENTION,
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
        del model.config.quantization_config  # it is no longer quantized, and save_pretrained would refuse
        del model.hf_quantizer
    return model, tokenizer


def check_tokens(tokenizer: PreTrainedTokenizerBase, num_rows: int, asked: str) -> None:
    """Raise ``ModelError`` if a token of a text or a chat is beyond the rows of the embedding.

    Special tokens may be, unless they begin or end a text or stand in the chat template: a padding token is
    often added without a row, also by conversion from GGUF.
    """
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_rows}
    spare = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    spare -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    template = str(tokenizer.chat_template or "")
    needed = sorted(number for number, token in beyond.items() if number not in spare or token in template)
    if needed:
        found = f"its tokenizer has '{beyond[needed[0]]}' as token {needed[0]}, and its embedding only {num_rows} rows"
        do = "save it again after model.resize_token_embeddings(len(tokenizer)), or take the added tokens out"
        raise ModelError(asked, found, do)


def check_context(config: PretrainedConfig, context: int, asked: str) -> None:
    """Raise ``ModelError`` if the model was made for shorter examples than ``model.context``."""
    limit = longest_example(config)
    if context > limit:
        found = f"it was made for {config.max_position_embeddings} positions and model.context is {context}"
        raise ModelError(asked, found, f"set model.context to {limit} or less")


def longest_example(config: PretrainedConfig) -> int:
    """Return the number of tokens of a model's longest example; a decoder needs one position more, for the end."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return CONTEXT_LIMIT
    return positions if family_of(config).is_encoder else positions - 1


def _check_finite(model: PreTrainedModel, asked: str) -> None:
    for name, weight in model.named_parameters():
        if weight.numel() and not torch.stack(torch.aminmax(weight.detach())).isfinite().all():
            found = f"its weights hold NaN or infinity in {weight.dtype}, first in '{name}'"
            raise ModelError(asked, found, f"{AGAIN}, or take another; model.dtype: float32 holds what float16 cannot")


@contextmanager
def _told(asked: str, do: str = DO, found: str = "cannot be loaded") -> Iterator[None]:
    """Turn the many errors that transformers raises for a broken model into ``ModelError``."""
    try:
        yield
    except GaisnetError:
        raise
    except Exception as error:
        raise ModelError(asked, f"{found} ({_said(error)})", _way_out(error, do)) from error


def _said(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _way_out(error: Exception, do: str) -> str:
    if isinstance(error, OSError) and error.errno in _DISK:
        return "free some space, or let HF_HOME name a folder that can be written"
    if "safetensors" in str(error) and "does not appear to have a file named" in str(error):
        return CONVERT
    return do
