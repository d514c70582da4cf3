"""Inputs of an encoder's head: texts or images.

Shape legend: N inputs, B inputs of a batch, T positions, D hidden size; C channels, H and W pixels of images.
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
    """Inputs of one kind: token ids, or pixels of one shape.

    Args:
        inputs: Texts, or pixels [C, H, W].
        tokenizer: Puts its special tokens around a text; None for a model of images.
        context: Longest text in tokens, special tokens included; longer texts are cut at the end.
        owner: Owner of the inputs, for errors.

    Raises:
        DataError: The model cannot read the inputs together.

    Attributes:
        ids: Token ids of the texts.
        lengths: Tokens of each text before it was cut.
        pixels_NCHW: Pixels of the images; None for texts.
    """

    def __init__(
        self, inputs: Sequence[Input], tokenizer: PreTrainedTokenizerBase | None, context: int, owner: str
    ) -> None:
        texts = [each for each in inputs if isinstance(each, str)]
        images = [each for each in inputs if not isinstance(each, str)]
        if texts and images:
            raise DataError(owner, f"has {len(texts)} texts and {len(images)} images", "give it one kind")
        self.ids: list[list[int]] = []
        self.lengths: list[int] = []
        self.pixels_NCHW: Tensor | None = _stack_images(images, owner) if images else None
        if texts and tokenizer is None:
            raise DataError(owner, "has texts, but the foundation model has no tokenizer to read them", "give images")
        if texts and tokenizer is not None:
            closed = [closed_ids(tokenizer, text) for text in texts]
            self.ids, self.lengths = [each.shortened(context) for each in closed], list(map(len, closed))

    def map_batches(self, run: Callable[[Tensor], Tensor]) -> Ragged:
        """Apply a function from token ids [B, T] or pixels [B, C, H, W] to [B, T, D] to all inputs, without gradients.

        Batches have no padding: all inputs of one have the same length.
        """
        if self.pixels_NCHW is None:
            ids = token_rows(self.ids, torch.device("cpu"))
            return ids.map_batches(lambda ids_BT1: run(ids_BT1[..., 0]), _BATCH, causal=False)
        with torch.no_grad():
            hidden_NTD = torch.cat([run(pixels_BCHW) for pixels_BCHW in self.pixels_NCHW.split(_BATCH)])
        return Ragged(hidden_NTD.flatten(0, 1), (hidden_NTD.shape[1],) * len(hidden_NTD))


def _stack_images(images: Sequence[Tensor], owner: str) -> Tensor:
    """Stack pixels to [N, C, H, W]. Raises ``DataError``."""
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or images[0].ndim != 3 or not all(image.is_floating_point() for image in images):
        found = f"has images of shape {', '.join(map(str, sorted(shapes)))}, some of them {images[0].dtype}"
        raise DataError(owner, found, "give pixels [channels, height, width] of one size, float and normalised")
    return torch.stack(list(images))
