"""Floating-point operations of a device that trains with a ViT, computed from the model's shape.

A product of N rows with a weight costs two operations per row and weight. Passing the gradient back through a layer
costs the same again, and once more where the layer's own weights are trained. Norms, activations, adapters and the
classifier are not counted.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gaisnet.models.pretrained import pretrained_config


@dataclass(frozen=True)
class Work:
    """Work per example.

    Attributes:
        once: Layers that run forward once, starting with the embeddings.
        from_layer: Layers from here on run forward and backward in every pass; None if the device has none of them.
        passes: Passes over the examples.
        all_learn: Whether the layers' weights are trained rather than a small adapter.
    """

    once: int
    from_layer: int | None = None
    passes: int = 0
    all_learn: bool = False


def flops_per_example(folder: Path, work: Work) -> float:
    """Return the operations per example for the ViT in ``folder``."""
    config: Any = pretrained_config(str(folder), str(folder))
    width, num_patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
    positions = num_patches + 1
    products = 2 * positions * (4 * width**2 + 2 * width * config.intermediate_size)
    layer = products + 2 * 2 * positions**2 * width  # attention: queries by keys, then weights by values
    embeddings = 2 * num_patches * width * config.num_channels * config.patch_size**2
    there_and_back = 0 if work.from_layer is None else config.num_hidden_layers - work.from_layer
    learned = products if work.all_learn else 0
    return float(embeddings + work.once * layer + work.passes * there_and_back * (2 * layer + learned))
