"""Hugging Face model families: where each keeps its parts, and how its layers are called.

A supported decoder has the Llama shape: embeddings, a list of equal layers called with the same arguments, a last norm,
a linear vocabulary head, and rotary position embeddings shared by all layers. A supported encoder has embeddings, equal
layers in which every position sees every other, and a classifier of the first position. ``FAMILIES`` lists only
families for which a test proves the split equal to the unsplit model.

Shape legend: B sequences, T positions, D hidden size, N rows (positions picked from several sequences), P extra rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from gaisnet.errors import ModelError


@dataclass(frozen=True)
class Family:
    """A family of models: a layer in two halves, the modules that get adapters, and the path to layers.

    Attributes:
        attend: The layer's first half, up to where rows are independent: takes the layer, hidden states [B, T, D] and
            the layer's other arguments; returns [B, T, D].
        finish: The second half, for any rows [..., D] of the first one's output.
        targets: A layer's linear modules that get adapters, unless the user names others.
        layers_path: Path to the list of layers in a model for a task.
        is_encoder: Whether every position sees every other and the first one is classified. Otherwise a position sees
            earlier ones, and the last ones carry labels.
    """

    attend: Callable[[Any, Tensor, Mapping[str, Any]], Tensor]
    finish: Callable[[Any, Tensor], Tensor]
    targets: tuple[str, ...]
    layers_path: str
    is_encoder: ClassVar[bool] = False


@dataclass(frozen=True)
class EncoderFamily(Family):
    """Additional facts about an encoder, whose layers call their attention ``attention``.

    Attributes:
        ending: Name of the module between the last layer and the classifier.
        keys_and_values: Maps rows [P, D] at a layer's input to keys and values, each [P, heads * size].
    """

    ending: str
    keys_and_values: Callable[[Any, Tensor], tuple[Tensor, Tensor]]
    is_encoder: ClassVar[bool] = True


def _llama_attend(layer: Any, hidden_BTD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    attended_BTD, *_ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_BTD), **arguments)
    return cast(Tensor, hidden_BTD + attended_BTD)


def _llama_finish(layer: Any, rows_ND: Tensor) -> Tensor:
    return cast(Tensor, rows_ND + layer.mlp(layer.post_attention_layernorm(rows_ND)))


def _vit_attend(layer: Any, hidden_BTD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    attended_BTD, _ = layer.attention(layer.layernorm_before(hidden_BTD), **arguments)
    return cast(Tensor, attended_BTD + hidden_BTD)


def _vit_finish(layer: Any, rows_ND: Tensor) -> Tensor:
    return cast(Tensor, layer.mlp(layer.layernorm_after(rows_ND)) + rows_ND)


def _vit_keys_and_values(layer: Any, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
    normed_PD = layer.layernorm_before(rows_PD)
    return layer.attention.k_proj(normed_PD), layer.attention.v_proj(normed_PD)


def _bert_attend(layer: Any, hidden_BTD: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    attended_BTD, _ = layer.attention(hidden_BTD, **arguments)
    return cast(Tensor, attended_BTD)


def _bert_finish(layer: Any, rows_ND: Tensor) -> Tensor:
    return cast(Tensor, layer.feed_forward_chunk(rows_ND))


def _bert_keys_and_values(layer: Any, rows_PD: Tensor) -> tuple[Tensor, Tensor]:
    inner = layer.attention.self
    return inner.key(rows_PD), inner.value(rows_PD)


LLAMA = Family(
    _llama_attend,
    _llama_finish,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    layers_path="model.layers",
)
VIT = EncoderFamily(
    _vit_attend,
    _vit_finish,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    layers_path="vit.layers",
    ending="layernorm",
    keys_and_values=_vit_keys_and_values,
)
BERT = EncoderFamily(
    _bert_attend,
    _bert_finish,
    targets=("query", "key", "value", "dense"),
    layers_path="bert.encoder.layer",
    ending="pooler",
    keys_and_values=_bert_keys_and_values,
)

ATTENTION = "sdpa"
"""The attention implementation of every model; packed and mixed rows replace it."""

LLAMA_SHAPED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ENCODERS = {"bert": BERT, "vit": VIT}
FAMILIES: Mapping[str, Family] = {**dict.fromkeys(LLAMA_SHAPED, LLAMA), **ENCODERS}


class Decoder:
    """Parts of a Llama-shaped causal language model by name; it owns none of them."""

    def __init__(self, model: PreTrainedModel) -> None:
        check_family(model.config, _name(model))
        inner = model.get_decoder()
        self.config: PretrainedConfig = model.config
        self.embed_tokens = cast(nn.Embedding, inner.embed_tokens)
        self.layers = cast(nn.ModuleList, inner.layers)
        self.norm = cast(nn.Module, inner.norm)
        self.rotary_emb = cast(nn.Module, inner.rotary_emb)
        self.lm_head = cast(nn.Linear, model.get_output_embeddings())


class Encoder:
    """Parts of an encoder by name, with or without a classifier; it owns none of them.

    Attributes:
        embeddings: Maps token ids [B, T], or pixels [B, C, height, width], to rows [B, T, D], [CLS] first.
        ending: The module between the last layer and the classifier: a norm, or BERT's pooler.
        classifier: The model's own classifier; None if it has none.
    """

    rotary_emb: None = None  # positions are in the embeddings

    def __init__(self, model: PreTrainedModel) -> None:
        name = _name(model)
        check_encoder(model.config, name)
        family, inner = ENCODERS[model.config.model_type], model.base_model
        ending = getattr(inner, family.ending)
        if ending is None:
            raise ModelError(name, f"it was built without its {family.ending}", "load the model with it")
        classifier = getattr(model, "classifier", None)
        self.config: PretrainedConfig = model.config
        self.embeddings = cast(nn.Module, inner.embeddings)
        self.layers = cast(nn.ModuleList, inner.get_submodule(family.layers_path.partition(".")[2]))
        self.ending = cast(nn.Module, ending)
        self.classifier = classifier if isinstance(classifier, nn.Linear) else None


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a checked model."""
    return FAMILIES[config.model_type]


def refuse_family(model_type: str, asked: str) -> None:
    """Raise ``ModelError`` unless models of this type can be cut."""
    if model_type not in FAMILIES:
        _refuse_decoder(model_type, asked)


def check_supported(config: PretrainedConfig, asked: str) -> None:
    """Raise ``ModelError`` unless ``config`` is of a family that can be cut."""
    (check_encoder if config.model_type in ENCODERS else check_family)(config, asked)


def check_family(config: PretrainedConfig, asked: str) -> None:
    """Raise ``ModelError`` unless ``config`` is a decoder's, of a family that can be cut."""
    if config.model_type not in LLAMA_SHAPED:
        _refuse_decoder(config.model_type, asked)


def _refuse_decoder(model_type: str, asked: str) -> NoReturn:
    do = f"use a decoder of one of: {', '.join(sorted(LLAMA_SHAPED))}"
    raise ModelError(asked, f"its family '{model_type}' is not supported", do)


def check_encoder(config: PretrainedConfig, asked: str) -> None:
    """Raise ``ModelError`` unless ``config`` is an encoder's, of a family that can be cut."""
    do = f"use an encoder of one of: {', '.join(sorted(ENCODERS))}"
    if config.model_type not in ENCODERS:
        raise ModelError(asked, f"its family '{config.model_type}' is not supported for classification", do)
    if getattr(config, "is_decoder", False):  # BERT's layers can be a decoder's, too
        raise ModelError(asked, "its configuration says is_decoder, so positions do not see later ones", do)


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return each layer's kind of attention: 'full_attention' or 'sliding_attention'."""
    types = getattr(config, "layer_types", None)
    if types:
        return list(types)
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def empty_decoder(config: PretrainedConfig) -> Decoder:
    """Build the modules of a model of ``config`` without memory (meta device), to load tensors into."""
    return Decoder(_empty(AutoModelForCausalLM, config))


def empty_encoder(config: PretrainedConfig) -> Encoder:
    """Build an encoder's modules without memory, and without a classifier."""
    return Encoder(_empty(AutoModel, config))


def _empty(kind: Any, config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=False, attn_implementation=ATTENTION)
    model.eval()
    return model


def _name(model: PreTrainedModel) -> str:
    return str(model.config.name_or_path or model.config.model_type)
