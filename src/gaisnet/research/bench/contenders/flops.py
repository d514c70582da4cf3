"""Floating-point operations of a device, computed from the model's shape, independent of kernels.

A product of N rows with a weight costs two operations per row and weight. A frozen layer passes its gradient back at
the same cost. Attention over T positions is causal: T / 2 positions are attended to on average. Norms, activations and
adapters are not counted; together they are less than a fiftieth of the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig

from gaisnet.data.examples import Tokens


@dataclass(frozen=True)
class Shape:
    """The numbers that decide the operations of a Llama-shaped decoder."""

    weights_per_layer: int  # weights of a layer's linear modules
    attention_width: int  # number of heads times head size
    weights_of_vocabulary: int
    num_layers: int

    @classmethod
    def from_model_config(cls, config: PretrainedConfig) -> "Shape":
        """Read the shape from a model's configuration."""
        width, heads = int(config.hidden_size), int(config.num_attention_heads)
        head = int(getattr(config, "head_dim", None) or width // heads)
        attention = width * head * (2 * heads + 2 * int(config.num_key_value_heads))  # q, o; k, v
        layer = attention + 3 * width * int(config.intermediate_size)
        return cls(layer, heads * head, width * int(config.vocab_size), int(config.num_hidden_layers))

    def layers(self, num_layers: int, num_positions: float) -> float:
        """Return the operations of some layers' forward pass over one sequence."""
        products = 2 * self.weights_per_layer + 2 * 2 * self.attention_width * num_positions / 2
        return num_layers * num_positions * products

    def vocabulary(self, num_rows: float) -> float:
        """Return the operations of the logits of some rows."""
        return 2.0 * self.weights_of_vocabulary * num_rows


def of_split_device(shape: Shape, head_layers: int, examples: Sequence[Tokens], epochs: int, cached: bool) -> float:
    """Return operations per sample and epoch: head (once or every epoch), and vocabulary head both ways at labels."""
    heads = sum(shape.layers(head_layers, len(t.input_ids)) for t in examples)
    tails = sum(2 * shape.vocabulary(len(t.label_ids)) for t in examples)
    return (heads / (epochs if cached else 1) + tails) / len(examples)


def of_whole_model(shape: Shape, first_layer: int, examples: Sequence[Tokens]) -> float:
    """Return operations per sample and epoch: all layers, backward to the first trained one, logits everywhere."""
    back = shape.num_layers - first_layer
    total = 0.0
    for tokens in examples:
        num_positions = len(tokens.input_ids)
        total += shape.layers(shape.num_layers, num_positions) + 2 * shape.vocabulary(num_positions)
        total += shape.layers(back, num_positions)
    return total / len(examples)
