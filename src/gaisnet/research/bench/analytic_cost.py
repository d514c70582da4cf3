"""Cost of a model of any size for a device and an edge, from its shape alone: memory, bytes, operations.

Tests compare it with runs; docs/decisions/0010-scale-and-cost-on-paper.md has the figures. Devices hold head, last norm
and vocabulary in ``device_precision``, and no layers of the tail. At an edge, layers between the longest head and the
adapters are held in ``domain.precision``, all others in ``model.dtype``.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import AutoConfig, PretrainedConfig

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.examples import Tokens
from gaisnet.messages import BodyOutput, BodyOutputGrad, Message, SmashedData
from gaisnet.research.bench.contenders.flops import Shape
from gaisnet.row_quant import row_bytes
from gaisnet.tiers.split.layout import Layout
from gaisnet.transport.codec import Codec

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_STEP, _LABELS = 10, 10  # of a usual frame, of which only the digits count
_NUMBER_BYTES = 4  # bytes of an example's number, of a length, of a count of labels, of a scale
_MODELS: dict[str, dict[str, Any]] = {  # published configurations: shape, layers before the adapters, dtype
    "SmolLM2 135M": {"shape": (576, 30, 9, 3, 1536, 49_152, True), "first_layer": 18, "dtype": "float32"},
    "Llama 3.2 1B": {"shape": (2048, 16, 32, 8, 8192, 128_256, True), "first_layer": 10, "dtype": "bfloat16"},
    "Llama 2 7B": {"shape": (4096, 32, 32, 32, 11_008, 32_000, False), "first_layer": 19, "dtype": "bfloat16"},
    "Llama 3 70B": {"shape": (8192, 80, 64, 8, 28_672, 128_256, False), "first_layer": 48, "dtype": "bfloat16"},
}
_SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "tie_word_embeddings",
)


class Cost(BaseModel):
    """Cost of one model and one kind of work. A sample is one example in one epoch."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device_weights_bytes: float = Field(description="Frozen weights of the device with the longest head.")
    edge_weights_bytes: float = Field(description="Frozen weights of the domain model's body.")
    adapter_bytes: float = Field(description="Of a domain adapter, in float32.")
    bytes_up: float = Field(description="Per sample, device to edge.")
    bytes_down: float = Field(description="Per sample, edge to device.")
    device_flops: float = Field(description="Per sample, on the device with the longest head.")
    edge_flops: float = Field(description="Per sample, at its edge, without LoRA's own.")


@dataclass(frozen=True)
class Work:
    """The training work, in means over examples."""

    positions: float  # input positions of an example
    labels: float
    frames: float  # messages each way per sample; one carries all that a step asks of a device
    devices: float = 0.0  # devices per example

    @classmethod
    def from_examples(cls, examples: Mapping[str, Sequence[Tokens]], batch_size: int) -> "Work":
        """Describe the examples of an edge's devices, by device."""
        every = [tokens for mine in examples.values() for tokens in mine]
        batch = min(batch_size, len(every))
        # Expected devices in a batch: a pass draws its examples without putting any back.
        num_batches = math.comb(len(every), batch)
        owners = sum(1 - math.comb(len(every) - len(mine), batch) / num_batches for mine in examples.values())
        positions = sum(len(tokens.input_ids) for tokens in every) / len(every)
        labels = sum(len(tokens.label_ids) for tokens in every) / len(every)
        return cls(positions, labels, owners / batch, len(examples) / len(every))


_PAPER = Work(positions=15.9, labels=2.33, frames=0.187, devices=3 / 630)
"""Work of configs/bench.yaml: 630 short medical descriptions on three devices."""


def cost(model: PretrainedConfig, config: Config, work: Work) -> Cost:
    """Compute the cost of fine-tuning ``model`` with ``config``'s cuts, settings and wire codes.

    Raises ``CutError``.
    """
    shape = Shape.from_model_config(model)
    layout = Layout(config, shape.num_layers)
    tune, head, first = config.fine_tune, layout.last_cut, layout.first_adapted
    there_and_back = 2 * (shape.num_layers - first)
    pulls = tune.anchor_batch_size / (tune.anchor_every * tune.batch_size) if tune.anchor_weight else 0.0
    up, down = _wire_bytes(model, config, work)
    return Cost(
        device_weights_bytes=_device_weights(model, config, head),
        edge_weights_bytes=_edge_weights(model, layout),
        adapter_bytes=_adapter_bytes(model, layout),
        bytes_up=up,
        bytes_down=down,
        device_flops=shape.layers(head, work.positions) / tune.local_epochs + 2 * shape.vocabulary(work.labels),
        edge_flops=shape.layers(first - head, work.positions) / tune.local_epochs
        + shape.layers(there_and_back, work.positions)
        + shape.layers(there_and_back, config.relay.tokens) * pulls,
    )


def costs_on_paper() -> dict[str, Cost]:
    """Compute the costs of configs/bench.yaml's network for models of several sizes, by name."""
    return {name: cost(_model(given["shape"]), _config(given), _PAPER) for name, given in _MODELS.items()}


def _model(shape: Sequence[Any]) -> PretrainedConfig:
    return AutoConfig.for_model("llama", **dict(zip(_SHAPE, shape, strict=True)))


def _config(given: Mapping[str, Any]) -> Config:
    devices = [{"name": f"clinic-{cut}", "head_layers": cut} for cut in (1, 2, 3)]
    return parse_config(
        {
            "device_precision": "int8",
            "model": {"dtype": given["dtype"]},
            "adapters": {"first_layer": given["first_layer"]},
            "relay": {"enabled": False},
            "fine_tune": {"local_epochs": 3},
            "edges": [{"name": "hospital", "domain": "medical", "devices": devices}],
        }
    )


def _wire_bytes(model: PretrainedConfig, config: Config, work: Work) -> tuple[float, float]:
    """Return bytes per sample, up and down."""
    width, wire, codec = int(model.hidden_size), config.wire, Codec(config.wire)
    row_1D, one_E = torch.zeros(1, width), torch.ones(1, dtype=torch.int32)
    output, grad = row_bytes(width, wire.body_output), row_bytes(width, wire.gradient)
    # A frame of usual size: a header grows with the digits of shapes and numbers.
    examples_E = torch.ones(max(1, round(1 / work.frames)), dtype=torch.int32)
    rows_ND = torch.zeros(max(1, round(work.labels / work.frames)), width)
    sent = BodyOutput("train", _STEP, _LABELS, examples_E, rows_ND)
    output_header = _size(codec, sent) - len(rows_ND) * output - len(examples_E) * _NUMBER_BYTES
    grad_header = _size(codec, BodyOutputGrad(_STEP, 10 / 3, rows_ND)) - len(rows_ND) * grad
    whole = _size(codec, SmashedData("device-1", "train", 1, one_E, one_E.clone(), row_1D))
    once = work.devices * (
        whole - row_bytes(width, wire.smashed) - 2 * _NUMBER_BYTES
    )  # one header for all of a device's rows
    smashed = (
        work.positions * row_bytes(width, wire.smashed) + 2 * _NUMBER_BYTES + once
    ) / config.fine_tune.local_epochs
    up = smashed + work.labels * grad + work.frames * grad_header
    return up, work.labels * output + _NUMBER_BYTES + work.frames * output_header


def _size(codec: Codec, message: Message) -> int:
    return len(codec.encode(message))


def _linears(model: PretrainedConfig) -> list[tuple[int, int]]:
    """Return inputs and outputs of a layer's matrices: query, key, value, output; gate, up, down."""
    width, inner = int(model.hidden_size), int(model.intermediate_size)
    head = int(getattr(model, "head_dim", None) or width // int(model.num_attention_heads))
    queries, keys = head * int(model.num_attention_heads), head * int(model.num_key_value_heads)
    attention = [(width, queries), (width, keys), (width, keys), (queries, width)]
    return [*attention, (width, inner), (width, inner), (inner, width)]


def _layer_bytes(model: PretrainedConfig, size: int, int8: bool = False) -> int:
    """Return the bytes of a layer's weights and two norms; int8 adds a scale per input and per output."""
    norms = 2 * int(model.hidden_size) * size
    if int8:
        return norms + sum(each * out + _NUMBER_BYTES * (each + out) for each, out in _linears(model))
    return norms + sum(each * out * size for each, out in _linears(model))


def _device_weights(model: PretrainedConfig, config: Config, head: int) -> int:
    """Return the bytes of a device's weights; norms stay in ``model.dtype`` at any device precision."""
    size, width = _BYTES[config.model.dtype], int(model.hidden_size)
    vocabularies = 1 if model.tie_word_embeddings else 2
    code = config.model.dtype if config.device_precision == "float32" else config.device_precision
    layer = sum(out * row_bytes(each, code) for each, out in _linears(model)) + 2 * width * size
    return head * layer + vocabularies * int(model.vocab_size) * row_bytes(width, code) + width * size


def _edge_weights(model: PretrainedConfig, layout: Layout) -> int:
    config = layout.config
    size, int8 = _BYTES[config.model.dtype], config.domain.precision == "int8"
    middle = len(layout.middle.layers())
    others = layout.tail_start - layout.first_cut - middle
    return middle * _layer_bytes(model, size, int8) + others * _layer_bytes(model, size)


def _adapter_bytes(model: PretrainedConfig, layout: Layout) -> int:
    """Return the bytes of an adapter on all matrices of its layers."""
    per_layer = sum(each + out for each, out in _linears(model)) * layout.config.adapters.rank
    return per_layer * len(layout.domain_spec().layers) * _BYTES["float32"]
