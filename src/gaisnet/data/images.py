"""Labelled images, Fashion-MNIST (Debian's package) and scikit-learn's digits: loading, sampling, partitioning.

Both data sets are grey, light on black, 28 x 28, so that one encoder takes both. Samples and partitions depend on their
seeds only.

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
"""Height and width of an image in pixels."""

FASHION_VARIABLE = "GAISNET_FASHION_MNIST"
"""Environment variable that names a folder with Fashion-MNIST's four files."""

_FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package
_FASHION_LABELS = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_DIGIT_SCALE, _DIGIT_LEVELS = 3, 16
_DIGITS_TEST_FRACTION = 3  # one third


@dataclass(frozen=True)
class Images:
    """Images with labels.

    Attributes:
        grey_NHW: Pixels, uint8; 0 is black.
        labels_N: Indices into the data set's ``labels``, int64.
    """

    grey_NHW: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels_N)

    def pixels_NCHW(self) -> Tensor:
        """Return float32 pixels between -1 and 1, as ViT's image processor would."""
        return self.grey_NHW[:, None].float() / 127.5 - 1

    def select(self, indices: npt.ArrayLike) -> "Images":
        """Return the images at ``indices``, in that order."""
        chosen = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return Images(self.grey_NHW[chosen], self.labels_N[chosen])


@dataclass(frozen=True)
class ImageData:
    """A data set: training set, test set and the names of its labels."""

    name: str
    labels: tuple[str, ...]
    train: Images
    test: Images


def load_images(name: str) -> ImageData:
    """Load a data set of ``IMAGE_DATA``. Raises ``DataError``, or ``MissingPackage`` with the command to install it."""
    if name not in IMAGE_DATA:
        raise DataError(f"images '{name}'", "are not built in", f"use one of: {', '.join(IMAGE_DATA)}")
    return IMAGE_DATA[name]()


def sample_images(data: ImageData, per_class: int, num_test: int, seed: int) -> ImageData:
    """Sample ``per_class`` training images of each label, and ``num_test`` test images.

    Samples with one seed are nested: the first ten of a label are among its first fifty. Raises ``DataError`` where the
    data set has too few.
    """
    rng = np.random.default_rng(seed)
    test = rng.permutation(len(data.test))[:num_test]
    labels = data.train.labels_N.numpy()
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(data.labels))]
    for asked, held, kind in (
        (num_test, len(data.test), "test images"),
        (per_class, min(map(len, pools)), "training images of each label"),
    ):
        if not 1 <= asked <= held:
            raise DataError(f"{asked} {kind} of '{data.name}'", f"it has {held}", f"ask for 1 to {held}")
    train = rng.permutation(np.concatenate([pool[:per_class] for pool in pools]))
    return ImageData(data.name, data.labels, data.train.select(train), data.test.select(test))


def deal_images(data: ImageData, num_devices: int, alpha: float, seed: int) -> list[ImageData]:
    """Partition a data set between devices with ``partition_by_label``: a smaller ``alpha`` gives more skew.

    A device has the same skew in training and test set. Raises ``DataError`` where a device gets no image.
    """
    for draw in range(MAX_DRAWS):
        train, test = (
            partition_by_label(range(len(own)), _names(data, own).__getitem__, num_devices, alpha, _rng(seed, draw))
            for own in (data.train, data.test)
        )
        if all(train) and all(test):
            return [
                ImageData(data.name, data.labels, data.train.select(mine), data.test.select(theirs))
                for mine, theirs in zip(train, test, strict=True)
            ]
    raise DataError(
        f"{num_devices} devices with images of '{data.name}', at a Dirichlet alpha of {alpha}",
        f"in each of {MAX_DRAWS} draws one got none of {len(data.train)} training or {len(data.test)} test images",
        "raise alpha, draw more images, or use fewer devices",
    )


def _names(data: ImageData, images: Images) -> list[str]:
    return [data.labels[label] for label in images.labels_N.tolist()]


def _rng(seed: int, draw: int) -> np.random.Generator:
    return np.random.default_rng([seed, draw])


def _fashion() -> ImageData:
    folder = Path(os.environ.get(FASHION_VARIABLE) or _FASHION_FOLDER)
    if not folder.is_dir():
        wanted = f"Fashion-MNIST in '{folder}' (or in the folder that {FASHION_VARIABLE} names)"
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
    """Enlarge 8 x 8 pixels of 17 levels by 3, without rounding, and pad the 24 x 24 pixels to 28 x 28.

    Digits are sorted by writer, so the test set is the last third: its writers are not in the training set.
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
    first = len(every) - len(every) // _DIGITS_TEST_FRACTION
    train, test = every.select(range(first)), every.select(range(first, len(every)))
    return ImageData("digits", tuple(map(str, range(10))), train, test)


IMAGE_DATA: Mapping[str, Callable[[], ImageData]] = {"fashion": _fashion, "digits": _digits}
"""Functions that load each data set, by its name."""
