"""An encoder cut in two: ``EncoderHead`` at the device, and ``EncoderBody`` to the end of the model.

Shape legend: B sequences, T positions, D hidden size, N rows ([CLS] of several sequences), C classes, P rows
that are shown to an attention.

What is classified is the first row of a sequence. The classifier is new for every task and learns with the adapters, so
it is where their layers are; for the device's tail only the loss is left. Nothing of an encoder is causal: where
sequences are padded, a mask must say so.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from transformers import PretrainedConfig

from gaisnet.errors import CutError, DataError, ModelError
from gaisnet.models.attention import Rows, let_attention_be_replaced, let_see
from gaisnet.models.families import ENCODERS, Encoder
from gaisnet.models.parts import Body, CutLayers, Layers


class EncoderHead(nn.Module):
    """A device's part: embeddings and the first layers. Token ids or pixels in, smashed data out."""

    def __init__(self, embeddings: nn.Module, layers: Layers) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stack = layers

    def forward(self, inputs: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Smashed data [B, T, D] of int64 token ids [B, T], or of pixels [B, channels, height, width].

        ``attention_mask_BT`` is 1 for real and 0 for padded positions; None if all are real. Raises ``DataError``.
        """
        config = self.stack.config
        _check_input(inputs, config)
        if inputs.is_floating_point():
            inputs = inputs.to(next(self.embeddings.parameters()).dtype)
        try:
            hidden_BTD = self.embeddings(inputs)
        except IndexError as error:
            raise _not_taken(inputs, config, f"but tokens below {config.vocab_size}") from error
        return self.stack.run(hidden_BTD, attention_mask_BT=attention_mask_BT)


def _check_input(inputs: Tensor, config: PretrainedConfig) -> None:
    """Raise ``DataError`` unless the shape is one that embeddings of ``config`` take."""
    if hasattr(config, "image_size"):
        size = config.image_size
        expected = (config.num_channels, *((size, size) if isinstance(size, int) else size))
        if inputs.ndim != 4 or tuple(inputs.shape[1:]) != expected or not inputs.is_floating_point():
            raise _not_taken(inputs, config, f"but float pixels of shape {expected}")
    elif inputs.ndim != 2 or inputs.shape[1] > config.max_position_embeddings or inputs.is_floating_point():
        raise _not_taken(inputs, config, f"but texts of at most {config.max_position_embeddings} tokens")


def _not_taken(inputs: Tensor, config: PretrainedConfig, expected: str) -> DataError:
    asked = f"a '{config.model_type}' encoder's input"
    found = f"its embeddings do not take one of shape {tuple(inputs.shape)} and {inputs.dtype}, {expected}"
    return DataError(asked, found, "give images of the model's size, or texts of its tokens, cut to its length")


class EncoderBody(Body):
    """All layers from some on, and the end of the model.

    Args:
        config: The FM's.
        layers: By their numbers in the FM.
        ending: The FM's last norm, or its pooler.
        classifier: Of the task that the FM was made for, or None. Adapters bring their own.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layers: Mapping[int, nn.Module],
        ending: nn.Module,
        classifier: nn.Module | None,
    ) -> None:
        super().__init__(config, layers, rotary_emb=None)
        self.ending = ending
        self.classifier = classifier

    def let_see(self, layer: int, rows: Rows) -> None:
        """From now on an FM layer's positions see ``rows`` [P, D], too, as if they were before every sequence.

        They are at the layer's input, and what the layer would make of them is dropped, so it is never computed.
        """
        let_attention_be_replaced(self.layers)
        module: Any = self.layers[str(layer)]
        let_see(module.attention, rows, partial(ENCODERS[self.config.model_type].keys_and_values, module))

    def classify(self, rows_ND: Tensor) -> Tensor:
        """Logits [N, C] of the last layer's output at [CLS] rows [N, D]. Raises ``ModelError`` without a classifier."""
        if self.classifier is None:
            found = "it has no classifier, for it was made for no task"
            raise ModelError(self.config.model_type, found, "put an adapter in that has one")
        return cast(Tensor, self.classifier(self.features(rows_ND)))

    def features(self, rows_ND: Tensor) -> Tensor:
        """What a classifier sees of the last layer's output at [CLS] rows, [N, D] both."""
        # A norm takes any rows; a pooler takes the first one of each sequence, and here that is all there is of it.
        return cast(Tensor, self.ending(rows_ND[:, None]).flatten(1))

    def for_owners(self, rows_ND: Tensor) -> Tensor:
        """What goes to the owners of [CLS] rows [N, D]: logits [N, C]. Raises as ``classify``."""
        return self.classify(rows_ND)


def first_rows(hidden_BTD: Tensor) -> Tensor:
    """Picks the row of each sequence that is classified, [B, D]."""
    return hidden_BTD[:, 0]


def cut_encoder(encoder: Encoder, cut: CutLayers) -> tuple[EncoderHead, EncoderBody]:
    """Cut a model in two parts that share its modules (no copy). Raises ``CutError``."""
    num_layers = len(encoder.layers)
    cut.check(num_layers)
    if cut.tail:
        found = "the last layers of an encoder learn together with its classifier, which is at the edge"
        raise CutError("cut.tail", cut.tail, found, "use 0")
    layers = dict(enumerate(encoder.layers))
    first = {index: layers.pop(index) for index in range(cut.head)}
    head = EncoderHead(encoder.embeddings, Layers(encoder.config, first, rotary_emb=None))
    return head, EncoderBody(encoder.config, layers, encoder.ending, encoder.classifier)
