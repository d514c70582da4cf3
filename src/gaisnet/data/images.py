"""Images with labels: Fashion-MNIST out of Debian's package, and scikit-learn's digits; draws of few, dealt to devices.

Both are grey, light on black, 28 x 28, so that one encoder takes them as they are. Draws and deals depend on their seed
alone.

Shape legend: N images, C channels (1), H and W pixels.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gaisnet.data.devices import MAX_DRAWS, partition_by_label
from gaisnet.data.idx import read_idx
from gaisnet.errors import DataError, MissingPackage

SIDE = 28
"""Pixels of an image, down and across."""

FASHION_VARIABLE = "GAISNET_FASHION_MNIST"
"""Environment variable that names another folder with Fashion-MNIST's four files."""

_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package puts them
_FASHION_LABELS = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_DIGIT_SCALE, _DIGIT_LEVELS = 3, 16
_DIGITS_HELD_OUT = 3  # a third of them


@dataclass(frozen=True)
class Images:
    """Some images and what is on them.

    Attributes:
        grey_NHW: uint8, 0 is black.
        labels_N: int64, places in the data set's ``labels``.
    """

    grey_NHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        """How many there are."""
        return len(self.labels_N)

    def pixels_NCHW(self) -> Tensor:
        """Float32 between -1 and 1: what ViT's own image processor makes of a grey image."""
        return self.grey_NHW[:, None].float() / 127.5 - 1

    def select(self, places: npt.ArrayLike) -> "Images":
        """Those at ``places``, in that order."""
        chosen = torch.as_tensor(np.asarray(places, dtype=np.int64))
        return Images(self.grey_NHW[chosen], self.labels_N[chosen])


@dataclass(frozen=True)
class ImageData:
    """A data set: what may be learned from, what is held out, and the names of its labels."""

    name: str
    labels: tuple[str, ...]
    train: Images
    test: Images


def load_images(name: str) -> ImageData:
    """One of ``IMAGE_DATA``, whole. Raises ``DataError``, or ``MissingPackage`` that says how to install it."""
    if name not in IMAGE_DATA:
        raise DataError(f"images '{name}'", "are not built in", f"use one of: {', '.join(IMAGE_DATA)}")
    return IMAGE_DATA[name]()


def sample_images(data: ImageData, per_class: int, num_test: int, seed: int) -> ImageData:
    """``per_class`` images of each label to learn from, and ``num_test`` held-out ones.

    Draws of one seed nest: ten of a label are among its fifty. Raises ``DataError`` where there are not as many.
    """
    rng = np.random.default_rng(seed)
    test = rng.permutation(len(data.test))[:num_test]
    labels = data.train.labels_N.numpy()
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(data.labels))]
    for asked, held, kind in (
        (num_test, len(data.test), "held-out images"),
        (per_class, min(map(len, pools)), "images of each label to learn from"),
    ):
        if not 1 <= asked <= held:
            raise DataError(f"{asked} {kind} of '{data.name}'", f"it has {held}", f"ask for 1 to {held}")
    train = rng.permutation(np.concatenate([pool[:per_class] for pool in pools]))
    return ImageData(data.name, data.labels, data.train.select(train), data.test.select(test))


def deal_images(data: ImageData, num_devices: int, alpha: float, seed: int) -> list[ImageData]:
    """What each device holds, skewed by label as ``partition_by_label`` does: the smaller ``alpha``, the more.

    A device's images to learn from and held-out ones are skewed alike. Raises ``DataError`` where a device gets none.
    """
    for draw in range(MAX_DRAWS):
        train, test = (
            partition_by_label(range(len(own)), _names(data, own).__getitem__, num_devices, alpha, _rng(seed, draw))
            for own in (data.train, data.test)
        )
        if all(train) and all(test):
            return [
                ImageData(data.name, data.labels, data.train.select(mine), data.test.select(held_out))
                for mine, held_out in zip(train, test, strict=True)
            ]
    raise DataError(
        f"{num_devices} devices with images of '{data.name}', at a Dirichlet alpha of {alpha}",
        f"in each of {MAX_DRAWS} draws one got none of {len(data.train)} images or of {len(data.test)} held-out ones",
        "raise alpha, draw more images, or use fewer devices",
    )


def _names(data: ImageData, images: Images) -> list[str]:
    return [data.labels[label] for label in images.labels_N.tolist()]


def _rng(seed: int, draw: int) -> np.random.Generator:
    return np.random.default_rng([seed, draw])


def _fashion() -> ImageData:
    folder = Path(os.environ.get(FASHION_VARIABLE) or _FASHION_FOLDER)
    if not folder.is_dir():
        wanted = f"Fashion-MNIST in '{folder}' (or wherever {FASHION_VARIABLE} says)"
        raise MissingPackage(wanted, "dataset-fashion-mnist", "apt-get install dataset-fashion-mnist")
    train, test = (_idx_pair(folder, prefix) for prefix in ("train", "t10k"))
    return ImageData("fashion", _FASHION_LABELS, train, test)


def _idx_pair(folder: Path, prefix: str) -> Images:
    grey = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", num_dims=3)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", num_dims=1)
    asked, do = f"Fashion-MNIST's '{prefix}' files in '{folder}'", "copy the data set again"
    if grey.shape != (len(labels), SIDE, SIDE):
        found = f"there are {len(labels)} labels for images of shape {grey.shape}"
        raise DataError(asked, found, do)
    if len(labels) == 0 or labels.max() >= len(_FASHION_LABELS):
        raise DataError(asked, f"labels are not all below {len(_FASHION_LABELS)}, or there are none", do)
    return Images(torch.from_numpy(grey.copy()), torch.from_numpy(labels.astype(np.int64)))


def _digits() -> ImageData:
    """8 x 8 pixels of 17 levels; each becomes 3 x 3, which is exact, and 2 black ones around make 28 of 24.

    They stand by writers, so the last third is held out, rather than neighbours of what is learned.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingPackage("images 'digits'", "scikit-learn", "pip install 'gaisnet[paper]'") from error
    levels_NHW, labels_N = load_digits(return_X_y=True)
    small_NHW = np.rint(levels_NHW.reshape(-1, 8, 8) * (255 / _DIGIT_LEVELS)).astype(np.uint8)
    large_NHW = small_NHW.repeat(_DIGIT_SCALE, axis=1).repeat(_DIGIT_SCALE, axis=2)
    margin = (SIDE - large_NHW.shape[1]) // 2
    grey_NHW = np.pad(large_NHW, ((0, 0), (margin, margin), (margin, margin)))
    every = Images(torch.from_numpy(grey_NHW), torch.from_numpy(labels_N.astype(np.int64)))
    first = len(every) - len(every) // _DIGITS_HELD_OUT
    train, test = every.select(range(first)), every.select(range(first, len(every)))
    return ImageData("digits", tuple(map(str, range(10))), train, test)


IMAGE_DATA: Mapping[str, Callable[[], ImageData]] = {"fashion": _fashion, "digits": _digits}
"""What reads each data set, by its name."""
