"""Images: reading of IDX files, samples, and partitions."""

import gzip
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gaisnet.data import idx
from gaisnet.data.idx import read_idx
from gaisnet.data.images import FASHION_VARIABLE, ImageData, Images, deal_images, load_images, sample_images
from gaisnet.errors import DataError, MissingPackage


def idx_bytes(values: npt.NDArray[np.uint8]) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_fashion(folder: Path, num_train: int = 40, num_test: int = 20) -> Path:
    """Write a data set in the format of Debian's package: image i has label i % 10 and a single grey level."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.broadcast_to(labels[:, None, None] * np.uint8(10), (count, 28, 28))
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    return folder


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_fashion(tmp_path / "fashion")
    monkeypatch.setenv(FASHION_VARIABLE, str(folder))
    return folder


def coloured(per_label: int, num_labels: int = 4) -> ImageData:
    """Make images with their label in one pixel and their number in another."""
    labels = torch.arange(num_labels).repeat(per_label)
    grey = torch.zeros(len(labels), 4, 4, dtype=torch.uint8)
    grey[:, 0, 0], grey[:, 1, 1] = labels.to(torch.uint8), torch.arange(len(labels)).to(torch.uint8)
    names = tuple(f"label-{number}" for number in range(num_labels))
    return ImageData("coloured", names, Images(grey, labels), Images(grey, labels))


def numbers(images: Images) -> list[int]:
    return images.grey_NHW[:, 1, 1].tolist()


def test_an_idx_file_gives_what_was_written_zipped_or_not(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "plain").write_bytes(idx_bytes(values))
    (tmp_path / "zipped.gz").write_bytes(gzip.compress(idx_bytes(values)))
    for name in ("plain", "zipped.gz"):
        np.testing.assert_array_equal(read_idx(tmp_path / name, 3), values)


GOOD = idx_bytes(np.zeros((3, 2), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "does not begin"),
        (GOOD[:6], "does not begin"),
        (b"\x00\x00\x0d\x02" + GOOD[4:], "does not begin"),  # floats
        (idx_bytes(np.zeros(3, dtype=np.uint8)), "does not begin"),  # another number of dimensions
        (GOOD[:-1], "there are fewer"),
        (GOOD + b"x", "there are more"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(tmp_path: Path, content: bytes, found: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DataError, match=found):
        read_idx(path, 2)


def test_a_size_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(bytes((0, 0, 8, 2)) + struct.pack(">2I", 2**31, 2**31))
    with pytest.raises(DataError, match=f"2147483648 x 2147483648 bytes; give one of at most {idx.MAX_BYTES}"):
        read_idx(path, 2)


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD)
    for damaged in (whole[:-10], b"\x1f\x8b" + bytes(20), whole[:12] + b"\xff" + whole[13:]):
        (tmp_path / "file.gz").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read|fewer|more|begin"):
            read_idx(tmp_path / "file.gz", 2)


def test_fashion_is_read_from_the_folder_of_the_environment(fashion: Path) -> None:
    data = load_images("fashion")
    assert (len(data.train), len(data.test), len(data.labels)) == (40, 20, 10)
    assert data.train.labels_N[:12].tolist() == [*range(10), 0, 1]
    pixels_NCHW = data.train.pixels_NCHW()
    assert pixels_NCHW.shape == (40, 1, 28, 28) and pixels_NCHW.dtype == torch.float32
    assert pixels_NCHW[3].unique().tolist() == pytest.approx([30 / 127.5 - 1])


def test_without_the_package_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FASHION_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(MissingPackage, match="apt-get install dataset-fashion-mnist"):
        load_images("fashion")


def test_files_of_fashion_that_do_not_fit_each_other_are_refused(fashion: Path) -> None:
    one_less = gzip.compress(idx_bytes(np.zeros(39, dtype=np.uint8)))
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(one_less)
    with pytest.raises(DataError, match="39 labels for images of shape"):
        load_images("fashion")
    (fashion / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="there is no such file"):
        load_images("fashion")


def test_a_label_without_a_name_is_refused(fashion: Path) -> None:
    labels = np.full(40, 10, dtype=np.uint8)
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(DataError, match="not all below 10"):
        load_images("fashion")


def test_digits_are_scaled_exactly_and_training_and_test_set_are_disjoint() -> None:
    sklearn_data = pytest.importorskip("sklearn.datasets")
    digits = load_images("digits")
    assert digits.train.grey_NHW.shape == (1198, 28, 28)
    assert len(digits.test) == 599
    first = digits.train.grey_NHW[0].numpy()
    assert first[2:26:3, 2:26:3] == pytest.approx(np.rint(sklearn_data.load_digits().images[0] * 255 / 16))
    assert (first[2:26:3] == first[4:26:3]).all() and (first[:, 2:26:3] == first[:, 4:26:3]).all()
    assert not first[:2].any() and not first[26:].any() and first.max() == 239  # 15 of 16 levels


def test_data_that_nobody_knows_is_refused_with_the_names_that_are() -> None:
    with pytest.raises(DataError, match="use one of: fashion, digits"):
        load_images("cats")


def test_samples_are_balanced_nested_and_depend_on_the_seed() -> None:
    data = coloured(per_label=8)
    two, five, other = (
        sample_images(data, 2, 6, seed=1),
        sample_images(data, 5, 6, seed=1),
        sample_images(data, 2, 6, seed=2),
    )
    assert torch.bincount(two.train.labels_N).tolist() == [2] * 4
    assert two.train.labels_N.tolist() == two.train.grey_NHW[:, 0, 0].tolist()
    assert set(numbers(two.train)) < set(numbers(five.train))
    assert numbers(two.test) == numbers(five.test) and len(set(numbers(two.test))) == 6
    assert set(numbers(two.train)) != set(numbers(other.train))
    assert numbers(two.train) == numbers(sample_images(data, 2, 6, seed=1).train)


@pytest.mark.parametrize(
    ("per_class", "num_test", "found"), [(9, 6, "each label"), (2, 33, "test images"), (0, 6, "0")]
)
def test_more_than_there_are_cannot_be_drawn(per_class: int, num_test: int, found: str) -> None:
    with pytest.raises(DataError, match=found):
        sample_images(coloured(per_label=8), per_class, num_test, seed=0)


def test_devices_get_every_image_once_and_a_small_alpha_skews_both_splits_alike() -> None:
    data = coloured(per_label=50)
    parts = deal_images(data, 5, 0.2, seed=3)
    for split in ("train", "test"):
        dealt = [number for part in parts for number in numbers(getattr(part, split))]
        assert sorted(dealt) == sorted(numbers(getattr(data, split)))
    for part in parts:
        assert torch.equal(*(torch.bincount(own.labels_N, minlength=4) for own in (part.train, part.test)))
    assert _unevenness(parts) > 3 * _unevenness(deal_images(data, 5, 100.0, seed=3))


def _unevenness(parts: list[ImageData]) -> float:
    counts = torch.stack([torch.bincount(part.train.labels_N, minlength=4).float() for part in parts])
    return float(counts.std(dim=0).mean())


def test_a_device_that_would_get_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="raise alpha"):
        deal_images(coloured(per_label=1), 5, 0.1, seed=0)
