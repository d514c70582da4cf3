"""Where each Hugging Face model family keeps its embeddings, layers, last norm and vocabulary head.

A family is supported when its decoder has the Llama shape: embeddings, a list of equal layers that are called with the
same arguments, a last norm, a linear vocabulary head, and rotary position embeddings shared by all layers. Only those
whose split is proved equal to the unsplit model by a test stand in ``LLAMA_SHAPED``.
"""

from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gaisnet.errors import ModelError

LLAMA_SHAPED = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class Decoder:
    """The parts of a Llama-shaped causal language model, by name; it owns none of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_family(model.config, model.config.name_or_path or model.config.model_type)
        inner = model.get_decoder()
        self.config: PretrainedConfig = model.config
        self.embed_tokens = cast(nn.Embedding, inner.embed_tokens)
        self.layers = cast(nn.ModuleList, inner.layers)
        self.norm = cast(nn.Module, inner.norm)
        self.rotary_emb = cast(nn.Module, inner.rotary_emb)
        self.lm_head = cast(nn.Linear, model.get_output_embeddings())


def check_family(config: PretrainedConfig, asked: str) -> None:
    """Raise ``ModelError`` unless the family of ``config`` can be cut."""
    if config.model_type not in LLAMA_SHAPED:
        raise ModelError(
            asked,
            f"its family '{config.model_type}' is not supported",
            f"use a decoder of one of: {', '.join(sorted(LLAMA_SHAPED))}",
        )


def layer_types(config: PretrainedConfig) -> list[str]:
    """Kind of attention of each layer: 'full_attention' or 'sliding_attention'."""
    types = getattr(config, "layer_types", None)
    if types:
        return list(types)
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def empty_decoder(config: PretrainedConfig) -> Decoder:
    """The modules of a model of ``config`` without memory for weights (meta device), to load tensors into."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Decoder(model.eval())
