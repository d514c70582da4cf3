"""Devices with images: the common setting of the fine-tuning experiments, and where they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Literal

from gaisnet.data.images import ImageData, deal_images, sample_images
from gaisnet.research.paper.experiment import Setup

Kind = Literal["lora", "prompts", "full"]
Mode = Literal["split", "local"]
HEAD_LAYERS, FIRST_LAYER = 1, 3
"""Layers of a device's head, and the first trained layer; the model has six."""

KINDS: tuple[Kind, ...] = ("prompts", "lora", "full")
LEARNING_RATES: dict[Kind, float] = {"lora": 4e-3, "prompts": 3e-2, "full": 4e-3}
"""The best of a few learning rates for devices that train alone, by kind; its seed is used by no experiment."""

NUM_DEVICES, PER_CLASS, EPOCHS = 8, 20, 2
"""Number of devices, labelled images of each class over all devices, and passes over them per round."""

ROUNDS, QUICK_ROUNDS = 10, 4
"""The number of devices."""

_NUM_TEST = 1000

HOW = (
    f"{NUM_DEVICES} devices hold {10 * PER_CLASS} labelled images of Fashion-MNIST together, and {_NUM_TEST} held-out "
    "ones; each device's held-out images are skewed as those it learns from. They tune the last three of the "
    f"pre-trained ViT's six layers; a split device holds {HEAD_LAYERS} of them, a local one the whole model. A round "
    f"is {EPOCHS} passes, and there are {ROUNDS} of them, {QUICK_ROUNDS} in a quick run. A step takes up to 16 images "
    "of those who learn together, so that devices that learn alone make fewer steps in a round; learning rates are the "
    "best of a few for these. Frames are counted as they cross: activations in int4, logits, their gradients and "
    "adapters in float32. Operations are computed from shapes, as if every layer were computed for every position."
)
"""The common setting of the fine-tuning experiments, for their reports."""


@dataclass(frozen=True)
class Site:
    """A device: its images, and whether it holds a head or the whole domain model."""

    data: ImageData
    mode: Mode


NETWORKS: Mapping[str, Sequence[Mode]] = {"hybrid": ("split", "local"), "federated": ("local",), "split": ("split",)}
"""Modes of the devices in each network, in turn."""


def sites(network: str, devices: Sequence[ImageData]) -> list[Site]:
    """Return the devices in the modes of one of ``NETWORKS``."""
    return [Site(data, mode) for data, mode in zip(devices, cycle(NETWORKS[network]), strict=False)]


def pooled(setup: Setup, seed: int) -> ImageData:
    """Return the images of all devices together."""
    return sample_images(setup.images("fashion"), PER_CLASS, _NUM_TEST, seed)


def dealt(setup: Setup, alpha: float, seed: int) -> list[ImageData]:
    """Deal images to devices; a smaller ``alpha`` gives each fewer main labels. Raises ``DataError``."""
    return deal_images(pooled(setup, seed), NUM_DEVICES, alpha, seed)
