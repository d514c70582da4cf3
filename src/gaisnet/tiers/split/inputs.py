"""What an encoder reads, texts or images, on its way into a head.

Shape legend: N inputs, B inputs of a batch, T positions, D hidden size; of images C channels, H and W pixels.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gaisnet.data.examples import Input
from gaisnet.errors import DataError
from gaisnet.models.ragged import Ragged, token_rows
from gaisnet.models.tokenization import closed_ids

_BATCH = 32


class EncoderInputs:
    """Some of one kind: token ids, or pixels of one shape.

    Args:
        inputs: Texts, or pixels [C, H, W].
        tokenizer: Puts its special tokens around a text; None where there can be images only.
        context: Longest text in tokens, these included; longer ones lose their end.
        owner: Of the inputs, for errors.

    Raises:
        DataError: Inputs that the model cannot read together.
    """

    def __init__(
        self, inputs: Sequence[Input], tokenizer: PreTrainedTokenizerBase | None, context: int, owner: str
    ) -> None:
        texts = [each for each in inputs if isinstance(each, str)]
        images = [each for each in inputs if not isinstance(each, str)]
        if texts and images:
            raise DataError(owner, f"has {len(texts)} texts and {len(images)} images", "give it one kind")
        self.ids: list[list[int]] = []
        self.lengths: list[int] = []  # of texts in tokens, before any lost its end
        self.pixels_NCHW: Tensor | None = _stacked(images, owner) if images else None
        if texts and tokenizer is None:
            raise DataError(owner, "has texts, but the foundation model has no tokenizer to read them", "give images")
        if texts and tokenizer is not None:
            closed = [closed_ids(tokenizer, text) for text in texts]
            self.ids, self.lengths = [each.shortened(context) for each in closed], list(map(len, closed))

    def map_batches(self, run: Callable[[Tensor], Tensor]) -> Ragged:
        """What a function makes of all, [B, T, D] of token ids [B, T] or pixels [B, C, H, W], without gradients.

        It sees no padding: a batch has one length.
        """
        if self.pixels_NCHW is None:
            ids = token_rows(self.ids, torch.device("cpu"))
            return ids.map_batches(lambda ids_BT1: run(ids_BT1[..., 0]), _BATCH, causal=False)
        with torch.no_grad():
            hidden_NTD = torch.cat([run(pixels_BCHW) for pixels_BCHW in self.pixels_NCHW.split(_BATCH)])
        return Ragged(hidden_NTD.flatten(0, 1), (hidden_NTD.shape[1],) * len(hidden_NTD))


def _stacked(images: Sequence[Tensor], owner: str) -> Tensor:
    """Pixels [N, C, H, W]. Raises ``DataError``."""
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or images[0].ndim != 3 or not all(image.is_floating_point() for image in images):
        found = f"has images of shape {', '.join(map(str, sorted(shapes)))}, some of them {images[0].dtype}"
        raise DataError(owner, found, "give pixels [channels, height, width] of one size, float and normalised")
    return torch.stack(list(images))
