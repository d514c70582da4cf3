"""An encoder cut in two: ``EncoderHead`` at the device, and ``EncoderBody`` to the end of the model.

Shape legend: B sequences, T positions, D hidden size, N rows ([CLS] of several sequences), C classes, P extra rows.

The first row of a sequence, [CLS], is classified. The classifier is new for every task and trained with the adapters,
so it lives in the body; the device's tail is only the loss. An encoder is not causal: padded sequences need a mask.
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
    """A device's part: embeddings and the first layers. Maps token ids or pixels to smashed data."""

    def __init__(self, embeddings: nn.Module, layers: Layers) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.stack = layers

    def forward(self, inputs: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Return smashed data [B, T, D] of int64 token ids [B, T], or of pixels [B, channels, height, width].

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
    """Raise ``DataError`` unless ``config``'s embeddings take this shape."""
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
    """All layers from a given one on, and the end of the model.

    Args:
        config: The FM's configuration.
        layers: Layers by their FM numbers.
        ending: The FM's last norm, or its pooler.
        classifier: The FM's own classifier, or None. Adapters bring their own.
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
        """Let an FM layer's positions also attend to ``rows`` [P, D], as if they preceded every sequence.

        The rows enter at the layer's input; their own outputs would be dropped, so they are not computed.
        """
        let_attention_be_replaced(self.layers)
        module: Any = self.layers[str(layer)]
        let_see(module.attention, rows, partial(ENCODERS[self.config.model_type].keys_and_values, module))

    def classify(self, rows_ND: Tensor) -> Tensor:
        """Return logits [N, C] of the last layer's [CLS] rows [N, D]. Raises ``ModelError`` without a classifier."""
        if self.classifier is None:
            found = "it has no classifier, for it was made for no task"
            raise ModelError(self.config.model_type, found, "put an adapter in that has one")
        return cast(Tensor, self.classifier(self.features(rows_ND)))

    def features(self, rows_ND: Tensor) -> Tensor:
        """Return the classifier's input for [CLS] rows of the last layer, [N, D] both."""
        # A norm takes any rows. A pooler takes the first row of each sequence; here each sequence is that row.
        return cast(Tensor, self.ending(rows_ND[:, None]).flatten(1))

    def for_owners(self, rows_ND: Tensor) -> Tensor:
        """Return what the owners of [CLS] rows [N, D] receive: logits [N, C]. Raises as ``classify``."""
        return self.classify(rows_ND)


def first_rows(hidden_BTD: Tensor) -> Tensor:
    """Pick the classified row of each sequence, [B, D]."""
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
