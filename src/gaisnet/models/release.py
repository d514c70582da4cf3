"""Parts to tensors and back: what a site needs of a model, and no more, so that it can build its parts without the FM.

Tensors are named as in the FM's decoder: ``embed_tokens.weight``, ``layers.3.mlp.up_proj.weight``, ``norm.weight``, and
``lm_head.weight`` where it is not tied to the embeddings. An int8 layer has int8 weights with their scales beside them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from gaisnet.errors import ModelError
from gaisnet.messages import ModelRelease
from gaisnet.models.families import Decoder, check_family, empty_decoder
from gaisnet.models.frozen import freeze_linears
from gaisnet.models.int8 import to_empty_int8
from gaisnet.models.parts import Body, CutLayers, Head, Layers, Tail

_EMBEDDINGS = "embed_tokens."
_HEAD = "lm_head."
_NORM = "norm."
M = TypeVar("M", bound=nn.Module)


def release_model(
    decoder: Decoder, body: Body, int8_layers: Iterable[int], last_cut: int, tail_start: int
) -> ModelRelease:
    """Everything that an edge and its devices need of a DM: heads up to ``last_cut``, the DM's ``body``, the tail."""
    tensors = {**_named(decoder.embed_tokens, _EMBEDDINGS), **_named(decoder.norm, _NORM)}
    if decoder.lm_head.weight is not decoder.embed_tokens.weight:
        tensors.update(_named(decoder.lm_head, _HEAD))
    layers = {i: decoder.layers[i] for i in range(last_cut)}
    layers.update({i: body.layers[str(i)] for i in body.indices})
    layers.update({i: decoder.layers[i] for i in range(tail_start, len(decoder.layers))})
    for index, layer in layers.items():
        tensors.update(_named(layer, _layer(index)))
    return ModelRelease(decoder.config.to_json_string(), tuple(sorted(layers)), tuple(sorted(int8_layers)), tensors)


def restrict(release: ModelRelease, layers: Iterable[int]) -> ModelRelease:
    """The same release with only some layers (for a device that holds just head and tail)."""
    wanted = set(layers)
    dropped = tuple(_layer(index) for index in release.layers if index not in wanted)
    tensors = {name: tensor for name, tensor in release.tensors.items() if not name.startswith(dropped)}
    kept = tuple(index for index in release.layers if index in wanted)
    return replace(
        release, layers=kept, int8_layers=tuple(i for i in release.int8_layers if i in wanted), tensors=tensors
    )


class ReleasedModel:
    """Builds parts out of a ``ModelRelease``. Raises ``ModelError`` where a tensor is missing or misshapen."""

    def __init__(self, release: ModelRelease) -> None:
        self._release = release
        self.config = _read_config(release.config_json)
        self._empty = empty_decoder(self.config)
        freeze_linears(self._empty.layers, self._empty.lm_head)
        self._rotary_emb = type(self._empty.rotary_emb)(self.config)

    @property
    def num_layers(self) -> int:
        """Layers of the FM."""
        return len(self._empty.layers)

    def head(self, cut: CutLayers) -> Head:
        """Embeddings and the first layers."""
        return _frozen(Head(self._embed_tokens(), self._layers(range(cut.head))))

    def body(self, first: int, stop: int) -> Body:
        """The DM's kept layers in [first, stop)."""
        kept = [index for index in self._release.layers if first <= index < stop]
        return _frozen(Body(self.config, self._built(kept), self._rotary_emb))

    def tail(self, cut: CutLayers, head: Head) -> Tail:
        """The last layers, the last norm and the vocabulary head (shared with ``head`` where the FM ties them)."""
        norm = _filled(self._empty.norm, self._release.tensors, _NORM)
        if any(name.startswith(_HEAD) for name in self._release.tensors):
            lm_head: nn.Module = _filled(self._empty.lm_head, self._release.tensors, _HEAD)
        else:
            lm_head = self._empty.lm_head
            lm_head.weight = head.embed_tokens.weight
        return _frozen(Tail(self._layers(range(self.num_layers - cut.tail, self.num_layers)), norm, lm_head))

    def _embed_tokens(self) -> nn.Embedding:
        return _filled(self._empty.embed_tokens, self._release.tensors, _EMBEDDINGS)

    def _layers(self, indices: Iterable[int]) -> Layers:
        return Layers(self.config, self._built(indices), self._rotary_emb)

    def _built(self, indices: Iterable[int]) -> dict[int, nn.Module]:
        return {index: self._layer(index) for index in indices}

    def _layer(self, index: int) -> nn.Module:
        layer = self._empty.layers[index]
        if index in self._release.int8_layers:
            to_empty_int8(layer)
        return _filled(layer, self._release.tensors, _layer(index))


def _read_config(config_json: str) -> PretrainedConfig:
    try:
        raw = json.loads(config_json)
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("of a release", f"its configuration cannot be read ({error})", "update both ends") from error
    check_family(config, "of a release")
    return config


def _layer(index: int) -> str:
    return f"layers.{index}."


def _named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def _filled(module: M, tensors: Mapping[str, Tensor], prefix: str) -> M:
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    for name, tensor in mine.items():
        if name in expected and tensor.is_floating_point() != expected[name].is_floating_point():
            found = f"'{prefix}{name}' is {tensor.dtype} where {expected[name].dtype} belongs"
            raise ModelError("of a release", found, "update both ends")
    try:
        module.load_state_dict(mine, assign=True)
    except RuntimeError as error:
        raise ModelError("of a release", f"'{prefix}' does not fit ({error})", "update both ends") from error
    return module


def _frozen(part: M) -> M:
    part.requires_grad_(False)
    return part.eval()
