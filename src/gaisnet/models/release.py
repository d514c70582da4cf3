"""Parts of a model as tensors and back: exactly what a site needs to build its parts without the FM.

Tensors are named as in the FM's decoder: ``embed_tokens.weight``, ``layers.3.mlp.up_proj.weight``, ``norm.weight``, and
``lm_head.weight`` unless it is tied to the embeddings. An encoder's names begin with ``embeddings.``,
``layers.3.``, ``ending.`` and, if the FM has a task, ``classifier.``. An int8 layer has int8 weights and
their scales. A device's quantized matrix has ``weight.codes`` and its scales in place of a ``weight``.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from gaisnet.config import DevicePrecision
from gaisnet.errors import ModelError
from gaisnet.messages import ModelRelease
from gaisnet.models.encoders import EncoderBody, EncoderHead
from gaisnet.models.families import (
    Decoder,
    Encoder,
    Family,
    check_encoder,
    check_family,
    check_supported,
    empty_decoder,
    empty_encoder,
    family_of,
)
from gaisnet.models.frozen import freeze_linears
from gaisnet.models.int8 import to_empty_int8
from gaisnet.models.parts import Body, CutLayers, Head, Layers, Tail
from gaisnet.models.weight_quant import RoundedEmbedding, RoundedMatrix, empty_linear, empty_matrix, to_empty_few_bits
from gaisnet.strict_json import loads

_EMBEDDINGS = "embed_tokens."
_HEAD = "lm_head."
_NORM = "norm."
_ENCODER_EMBEDDINGS = "embeddings."
_ENDING = "ending."
_CLASSIFIER = "classifier."
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)
M = TypeVar("M", bound=nn.Module)


def release_model(
    decoder: Decoder, body: Body, int8_layers: Iterable[int], last_cut: int, tail_start: int
) -> ModelRelease:
    """Release everything that an edge and its devices need: heads up to ``last_cut``, the DM's ``body``, the tail."""
    tensors = {**_named(decoder.embed_tokens, _EMBEDDINGS), **_named(decoder.norm, _NORM)}
    if decoder.lm_head.weight is not decoder.embed_tokens.weight:
        tensors.update(_named(decoder.lm_head, _HEAD))
    outer = (*range(last_cut), *range(tail_start, len(decoder.layers)))
    return _released(decoder, body, outer, int8_layers, tensors)


def release_encoder(encoder: Encoder, body: Body, int8_layers: Iterable[int], last_cut: int) -> ModelRelease:
    """Release an encoder's DM, before adapters are on its body."""
    tensors = {**_named(encoder.embeddings, _ENCODER_EMBEDDINGS), **_named(encoder.ending, _ENDING)}
    if encoder.classifier is not None:
        tensors.update(_named(encoder.classifier, _CLASSIFIER))
    return _released(encoder, body, range(last_cut), int8_layers, tensors)


def _released(
    model: Decoder | Encoder, body: Body, outer: Iterable[int], int8_layers: Iterable[int], tensors: dict[str, Tensor]
) -> ModelRelease:
    """Release the FM's ``outer`` layers, and the body's own layers where it has them."""
    layers = {index: model.layers[index] for index in outer} | {i: body.layers[str(i)] for i in body.indices}
    for index in sorted(layers):
        tensors.update(_named(layers[index], _layer(index)))
    return ModelRelease(model.config.to_json_string(), tuple(sorted(layers)), tuple(sorted(int8_layers)), tensors)


def restrict(release: ModelRelease, layers: Iterable[int]) -> ModelRelease:
    """Return the release with only some layers (for a device that holds just head and tail).

    An encoder's ending goes with its last layer.
    """
    wanted = set(layers)
    dropped = tuple(_layer(index) for index in release.layers if index not in wanted)
    if max(release.layers, default=0) not in wanted:
        dropped = (*dropped, _ENDING, _CLASSIFIER)
    tensors = {name: tensor for name, tensor in release.tensors.items() if not name.startswith(dropped)}
    kept = tuple(index for index in release.layers if index in wanted)
    return replace(
        release, layers=kept, int8_layers=tuple(i for i in release.int8_layers if i in wanted), tensors=tensors
    )


def rounded(release: ModelRelease, layers: Iterable[int], precision: DevicePrecision) -> ModelRelease:
    """Return the release with embeddings, vocabulary head and some layers quantized, for a device."""
    if precision == "float32":
        return release
    held = (_EMBEDDINGS, _HEAD, *map(_layer, layers))
    tensors: dict[str, Tensor] = {}
    for name, tensor in release.tensors.items():
        if tensor.ndim == 2 and name.startswith(held):
            tensors.update(_named(RoundedMatrix.quantize(tensor, precision), f"{name}."))
        else:
            tensors[name] = tensor
    return replace(release, precision=precision, tensors=tensors)


class Released(Protocol):
    """Builds parts of a model of any family. All methods raise ``ModelError`` for a missing or misshapen tensor."""

    config: PretrainedConfig

    @property
    def num_layers(self) -> int:
        """The FM's number of layers."""

    @property
    def family(self) -> Family:
        """The FM's family."""

    def outer(self, cut: CutLayers) -> tuple[Head | EncoderHead, Tail | None]:
        """Build a device's parts; there is no tail if the body goes to the end of the model."""

    def body(self, first: int, stop: int | None = None) -> Body:
        """Build the DM's kept layers in [first, stop), or to the end."""


def released(release: ModelRelease) -> Released:
    """Return the builder for a release. Raises ``ModelError`` if it is unreadable, or its family unknown."""
    config = _read_config(release.config_json, check_supported)
    return ReleasedEncoder(release) if family_of(config).is_encoder else ReleasedModel(release)


class _Released:
    """Fills a model's empty layers with the tensors of a release."""

    def __init__(self, release: ModelRelease, empty: Decoder | Encoder, rotary_emb: nn.Module | None) -> None:
        self._release = release
        self._layers = empty.layers
        self._rotary_emb = rotary_emb
        self.config = empty.config

    @property
    def num_layers(self) -> int:
        """The FM's number of layers."""
        return len(self._layers)

    @property
    def family(self) -> Family:
        """The FM's family."""
        return family_of(self.config)

    def _outer_layers(self, indices: Iterable[int]) -> Layers:
        """Build the layers of a head or a tail."""
        return Layers(self.config, {index: self._outer_layer(index) for index in indices}, self._rotary_emb)

    def _outer_layer(self, index: int) -> nn.Module:
        layer = self._layers[index]
        if self._release.precision != "float32":
            to_empty_few_bits(layer, self._release.precision)
        return _filled(layer, self._release.tensors, _layer(index))

    def _inner_layers(self, first: int, stop: int) -> dict[int, nn.Module]:
        """Build a body's layers: those in [first, stop) that the DM keeps."""
        return {index: self._inner_layer(index) for index in self._release.layers if first <= index < stop}

    def _inner_layer(self, index: int) -> nn.Module:
        layer = self._layers[index]
        if index in self._release.int8_layers:
            to_empty_int8(layer)
        return _filled(layer, self._release.tensors, _layer(index))


class ReleasedModel(_Released):
    """Builds a decoder's parts from a ``ModelRelease``. Raises ``ModelError`` for a missing or misshapen tensor."""

    def __init__(self, release: ModelRelease) -> None:
        config = _read_config(release.config_json, check_family)
        self._empty = empty = empty_decoder(config)
        freeze_linears(empty.layers, empty.lm_head)
        super().__init__(release, empty, type(empty.rotary_emb)(config))

    def outer(self, cut: CutLayers) -> tuple[Head, Tail]:
        """Build head and tail."""
        head = self.head(cut)
        return head, self.tail(cut, head)

    def head(self, cut: CutLayers) -> Head:
        """Build embeddings and the first layers."""
        return _frozen(Head(self._embed_tokens(), self._outer_layers(range(cut.head))))

    def body(self, first: int, stop: int | None = None) -> Body:
        """Build the DM's kept layers."""
        stop = self.num_layers if stop is None else stop
        return _frozen(Body(self.config, self._inner_layers(first, stop), self._rotary_emb))

    def tail(self, cut: CutLayers, head: Head) -> Tail:
        """Build the last layers, the last norm and the vocabulary head (shared with ``head`` if the FM ties them)."""
        layers = self._outer_layers(range(self.num_layers - cut.tail, self.num_layers))
        return _frozen(Tail(layers, self._norm(), self._lm_head(head)))

    def _norm(self) -> nn.Module:
        return _filled(self._empty.norm, self._release.tensors, _NORM)

    def _embed_tokens(self) -> nn.Embedding | RoundedEmbedding:
        empty: nn.Embedding | RoundedEmbedding = self._empty.embed_tokens
        if self._release.precision != "float32":
            matrix = empty_matrix(self._release.precision, *self._empty.embed_tokens.weight.shape)
            empty = RoundedEmbedding(matrix, next(self._norm().parameters()).dtype)
        return _filled(empty, self._release.tensors, _EMBEDDINGS)

    def _lm_head(self, head: Head) -> nn.Module:
        empty: nn.Module = self._empty.lm_head
        if self._release.precision != "float32":
            empty = empty_linear(self._empty.lm_head, self._release.precision)
        if any(name.startswith(_HEAD) for name in self._release.tensors):
            return _filled(empty, self._release.tensors, _HEAD)
        empty.weight = head.embed_tokens.weight
        return empty


class ReleasedEncoder(_Released):
    """Builds an encoder's parts from a ``ModelRelease``. Raises ``ModelError`` as ``ReleasedModel`` does."""

    def __init__(self, release: ModelRelease) -> None:
        config = _read_config(release.config_json, check_encoder)
        self._empty = empty = empty_encoder(config)
        freeze_linears(empty.layers, empty.ending)
        super().__init__(release, empty, rotary_emb=None)

    def outer(self, cut: CutLayers) -> tuple[EncoderHead, None]:
        """Build the head; an encoder has no tail."""
        return self.head(cut), None

    def head(self, cut: CutLayers) -> EncoderHead:
        """Build embeddings and the first layers. The embeddings are never quantized."""
        tensors, shapes = self._release.tensors, self._empty.embeddings.state_dict()
        for name, tensor in shapes.items():  # before memory is allocated for what a configuration claims
            found = tensors.get(f"{_ENCODER_EMBEDDINGS}{name}")
            if found is None or found.shape != tensor.shape:
                is_there = "missing" if found is None else f"of shape {tuple(found.shape)}"
                odd = f"'{_ENCODER_EMBEDDINGS}{name}' is {is_there}, its configuration says {tuple(tensor.shape)}"
                raise ModelError("of a release", odd, "update both ends")
        empty = type(self._empty.embeddings)(self.config)  # with memory: it holds numbers that no release has
        embeddings = _filled(empty, tensors, _ENCODER_EMBEDDINGS)
        return _frozen(EncoderHead(embeddings, self._outer_layers(range(cut.head))))

    def body(self, first: int, stop: int | None = None) -> EncoderBody:
        """Build the DM's kept layers and the model's ending; ``stop`` can only be the end."""
        tensors, layers = self._release.tensors, self._inner_layers(first, self.num_layers)
        ending = _filled(self._empty.ending, tensors, _ENDING)
        return _frozen(EncoderBody(self.config, layers, ending, self._classifier()))

    def _classifier(self) -> nn.Module | None:
        """Build the FM's own classifier, if the release has one."""
        if not any(name.startswith(_CLASSIFIER) for name in self._release.tensors):
            return None
        with torch.device("meta"):
            empty = nn.Linear(self.config.hidden_size, int(self.config.num_labels or 0))
        freeze_linears(empty)
        return _filled(empty, self._release.tensors, _CLASSIFIER)


def _read_config(config_json: str, check: Callable[[PretrainedConfig, str], None]) -> PretrainedConfig:
    try:
        raw = loads(config_json)
        config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("of a release", f"its configuration cannot be read ({error})", "update both ends") from error
    check(config, "of a release")
    return config


def _layer(index: int) -> str:
    return f"layers.{index}."


def _named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}


def _filled(module: M, tensors: Mapping[str, Tensor], prefix: str) -> M:
    mine = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    expected = module.state_dict()
    for name, tensor in mine.items():
        if name in expected and not _fits(tensor.dtype, expected[name].dtype):
            found = f"'{prefix}{name}' is {tensor.dtype} where {expected[name].dtype} belongs"
            raise ModelError("of a release", found, "update both ends")
    try:
        module.load_state_dict(mine, assign=True)
    except RuntimeError as error:
        raise ModelError("of a release", f"'{prefix}' does not fit ({error})", "update both ends") from error
    return module


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    """Return whether dtypes agree: integers exactly, floats in any dtype that models are held in."""
    return found in _FLOATING if expected.is_floating_point else found == expected


def _frozen(part: M) -> M:
    part.requires_grad_(False)
    return part.eval()
