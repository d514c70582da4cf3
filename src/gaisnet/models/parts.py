"""``Head``, ``Body`` and ``Tail``: a decoder cut in three. They wrap the layers of transformers and copy none of them.

Shape legend: B sequences, T positions, D hidden size, V vocabulary, N rows (positions picked from several
sequences).

Parts keep the layer numbers of the foundation model (FM) even where layers are missing, so that an adapter's names
mean the same in every body. Right padding needs no mask in a decoder: under causal attention a padded position cannot
reach a real one. ``models.encoders`` has the parts of encoders, made of the same ``Layers``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)

from gaisnet.errors import CutError, ModelError
from gaisnet.models.families import Decoder, family_of, layer_types
from gaisnet.models.packing import Packing
from gaisnet.models.weight_quant import RoundedEmbedding

# transformers 5.24 renamed the argument of masks and layers together, from 'past_key_values'.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the argument that carries keys and values of earlier positions."""


@dataclass(frozen=True)
class CutLayers:
    """Number of FM layers on a device: the first ``head`` after the embeddings, the last ``tail``."""

    head: int
    tail: int = 0

    def check(self, num_layers: int) -> None:
        """Raise ``CutError`` unless at least one layer is left for the body."""
        if self.head < 0 or self.tail < 0 or self.head + self.tail >= num_layers:
            raise CutError(
                "cut",
                f"head {self.head}, tail {self.tail}",
                f"the model has {num_layers} layers",
                "leave one for the body",
            )


class PartCache(DynamicCache):
    """Keys and values of one part's layers, addressed by FM layer numbers."""

    def __init__(self, config: PretrainedConfig, layer_indices: list[int]) -> None:
        super().__init__()
        types = layer_types(config)
        self.layers = [_cache_layer(config, types[index]) for index in layer_indices]
        self._slot_of = {index: slot for slot, index in enumerate(layer_indices)}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to the cache of FM layer ``layer_idx``; called by transformers' attention."""
        return super().update(key_states, value_states, self._slot_of[layer_idx], *args, **kwargs)


def _cache_layer(config: PretrainedConfig, kind: str) -> DynamicLayer:
    if kind == "sliding_attention":
        return DynamicSlidingWindowLayer(sliding_window=config.sliding_window)
    return DynamicLayer()


Pick = Callable[[Tensor], Tensor]
"""Picks rows: [B, T, D] -> [N, D]."""


class Layers(nn.Module):
    """Some layers of the FM, run one after the other.

    Args:
        config: The FM's configuration.
        layers: Layers by their FM numbers.
        rotary_emb: A decoder's; an encoder has its positions in the embeddings.
    """

    def __init__(self, config: PretrainedConfig, layers: Mapping[int, nn.Module], rotary_emb: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.family = family_of(config)
        self.indices = sorted(layers)
        self.layers = nn.ModuleDict({str(index): layers[index] for index in self.indices})
        self.rotary_emb: Any = rotary_emb

    def new_cache(self) -> PartCache:
        """Return an empty key-value cache for exactly these layers. Raises ``ModelError`` for an encoder."""
        if self.family.is_encoder:
            found = "it is an encoder, in which earlier positions see later ones: no keys and values can be kept"
            raise ModelError(self.config.model_type, found, "run whole sequences")
        return PartCache(self.config, self.indices)

    def run(
        self,
        hidden_BTD: Tensor,
        start: int = 0,
        stop: int | None = None,
        cache: PartCache | None = None,
        attention_mask_BT: Tensor | None = None,
        pick: Pick | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Run the layers whose FM number is in [start, stop).

        Args:
            hidden_BTD: Input of layer ``start``, in the dtype of the layers.
            start: First FM layer to run.
            stop: FM layer to stop before; None runs to the end.
            cache: From ``new_cache``; holds earlier positions and takes in these. Then ``start`` and ``stop`` must
                be the same at every call.
            attention_mask_BT: 1 for real and 0 for padded positions, earlier ones in the cache included. A decoder
                only needs it with left padding, an encoder with any.
            pick: Selects from the output; the last layer computes no more than it must.
            packing: Positions of the sequences, if ``hidden_BTD`` are packed rows, [1, N, D]. Then there is no cache,
                and ``layers`` must have passed ``let_attention_be_replaced``.

        Returns:
            Output of the last layer that ran, [B, T, D], or ``pick`` of it.
        """
        chosen = [index for index in self.indices if index >= start and (stop is None or index < stop)]
        if not chosen:
            return hidden_BTD if pick is None else pick(hidden_BTD)
        kinds, arguments = layer_types(self.config), self._arguments(hidden_BTD, cache, attention_mask_BT, packing)
        for index in chosen:
            layer, mine = self.layers[str(index)], arguments[kinds[index]]
            if pick is not None and index == chosen[-1]:
                # Attention sees all positions; the rest of the layer, most of its weights, only those that are picked.
                return self.family.finish(layer, pick(self.family.attend(layer, hidden_BTD, mine)))
            hidden_BTD = layer(hidden_BTD, **mine)
        return hidden_BTD

    def _arguments(
        self,
        hidden_BTD: Tensor,
        cache: PartCache | None,
        attention_mask_BT: Tensor | None,
        packing: Packing | None,
    ) -> dict[str, dict[str, Any]]:
        """Return every layer's arguments beside hidden states, by its kind of attention."""
        replaced: dict[str, Any] = {} if packing is None else {"attend": packing.attend}
        padded_BTD = hidden_BTD if packing is None else packing.padded_like(hidden_BTD)
        if self.family.is_encoder:
            real_BT = attention_mask_BT if packing is None else packing.real_BT
            mask = create_bidirectional_mask(self.config, padded_BTD, real_BT)
            return {"full_attention": {"attention_mask": mask, **replaced}}
        positions_BT = self._positions(padded_BTD, cache, attention_mask_BT)
        masks = self._masks(padded_BTD, cache, attention_mask_BT, positions_BT)
        if packing is not None:
            positions_BT = packing.positions_1N
        shared = {
            "position_ids": positions_BT,
            "position_embeddings": self.rotary_emb(hidden_BTD, position_ids=positions_BT),
            "use_cache": cache is not None,
            CACHE: cache,
            **replaced,
        }
        return {kind: {"attention_mask": mask, **shared} for kind, mask in masks.items()}

    def _positions(self, hidden_BTD: Tensor, cache: PartCache | None, attention_mask_BT: Tensor | None) -> Tensor:
        num_new = hidden_BTD.shape[1]
        if attention_mask_BT is not None:
            counted = attention_mask_BT.long().cumsum(-1) - 1
            return counted.clamp(min=0)[:, -num_new:]
        seen = 0 if cache is None else int(cache.get_seq_length())
        return torch.arange(seen, seen + num_new, device=hidden_BTD.device).unsqueeze(0)

    def _masks(
        self, hidden_BTD: Tensor, cache: PartCache | None, attention_mask_BT: Tensor | None, positions_BT: Tensor
    ) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "config": self.config,
            "inputs_embeds": hidden_BTD,
            "attention_mask": attention_mask_BT,
            CACHE: cache,
            "position_ids": positions_BT,
        }
        makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        kinds = {layer_types(self.config)[index] for index in self.indices}
        return {kind: makers[kind](**shared) for kind in kinds}


class Head(nn.Module):
    """A device's first part: embeddings and the first layers. Maps token ids to smashed data."""

    def __init__(self, embed_tokens: nn.Embedding | RoundedEmbedding, layers: Layers) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.stack = layers

    def new_cache(self) -> PartCache:
        """Return an empty key-value cache for the layers of this part."""
        return self.stack.new_cache()

    def forward(
        self, input_ids_BT: Tensor, cache: PartCache | None = None, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Return smashed data [B, T, D] of int64 token ids [B, T]."""
        hidden_BTD: Tensor = self.embed_tokens(input_ids_BT)
        return self.stack.run(hidden_BTD, cache=cache, attention_mask_BT=attention_mask_BT)


class Body(Layers):
    """The middle layers, at an edge (DM) or in the cloud (FM). Maps smashed data to body output."""

    def forward(
        self, hidden_BTD: Tensor, cache: PartCache | None = None, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Return body output [B, T, D] of smashed data [B, T, D] from the layer before this body."""
        return self.run(hidden_BTD, cache=cache, attention_mask_BT=attention_mask_BT)

    def for_owners(self, rows_ND: Tensor) -> Tensor:
        """Return what the owners of rows [N, D] of the last layer's output receive: the rows themselves."""
        return rows_ND


class Tail(nn.Module):
    """A device's last part: the last layers, the last norm and the vocabulary head. Maps body output to logits."""

    def __init__(self, layers: Layers, norm: nn.Module, lm_head: nn.Module) -> None:
        super().__init__()
        self.stack = layers
        self.norm = norm
        self.lm_head = lm_head

    def new_cache(self) -> PartCache:
        """Return an empty key-value cache for the layers of this part."""
        return self.stack.new_cache()

    def forward(
        self, hidden_BTD: Tensor, cache: PartCache | None = None, attention_mask_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, T, V] of body output [B, T, D]."""
        return self.logits(self.stack.run(hidden_BTD, cache=cache, attention_mask_BT=attention_mask_BT))

    def logits(self, rows_ND: Tensor) -> Tensor:
        """Return logits [..., V] of outputs of the last layer [..., D]; any positions, in any order."""
        return cast(Tensor, self.lm_head(self.norm(rows_ND)))


def cut_decoder(decoder: Decoder, cut: CutLayers) -> tuple[Head, Body, Tail]:
    """Cut a model in three parts that share its modules (no copy). Raises ``CutError``."""
    num_layers = len(decoder.layers)
    cut.check(num_layers)

    def some(first: int, stop: int) -> dict[int, nn.Module]:
        return {index: decoder.layers[index] for index in range(first, stop)}

    body_stop = num_layers - cut.tail
    head = Head(decoder.embed_tokens, Layers(decoder.config, some(0, cut.head), decoder.rotary_emb))
    body = Body(decoder.config, some(cut.head, body_stop), decoder.rotary_emb)
    tail = Tail(Layers(decoder.config, some(body_stop, num_layers), decoder.rotary_emb), decoder.norm, decoder.lm_head)
    return head, body, tail
