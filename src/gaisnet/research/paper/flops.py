"""Floating-point operations of a device that learns with a ViT, from its shape, whatever kernels compute them.

A product of N rows with a weight is two operations per row and weight. A layer passes its gradient back by as many
again, and by as many once more where its own weights learn. Norms, activations, adapters and the classifier are left
out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaisnet.models.pretrained import pretrained_config


@dataclass(frozen=True)
class Work:
    """Of one example.

    Attributes:
        once: Layers that it runs through once, from the embeddings on.
        from_layer: Layers from here on run there and back in every pass; None if the device has none of them.
        passes: Over the examples.
        all_learn: Weights of layers learn, rather than a small adapter.
    """

    once: int
    from_layer: int | None = None
    passes: int = 0
    all_learn: bool = False


def flops_per_example(folder: Path, work: Work) -> float:
    """Of the ViT in ``folder``."""
    config: Any = pretrained_config(str(folder), str(folder))
    width, num_patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    positions = num_patches + 1
    products = 2 * positions * (4 * width**2 + 2 * width * config.intermediate_size)
    layer = products + 2 * 2 * positions**2 * width  # attention: queries by keys, and what is seen of values
    embeddings = 2 * num_patches * width * config.num_channels * config.patch_size**2
    there_and_back = 0 if work.from_layer is None else config.num_hidden_layers - work.from_layer
    learned = products if work.all_learn else 0
    return float(embeddings + work.once * layer + work.passes * there_and_back * (2 * layer + learned))
