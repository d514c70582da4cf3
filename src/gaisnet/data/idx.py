"""Reading of files in MNIST's IDX format: a magic number with the number of dimensions, their sizes, and the values.

Headers are checked before the values are read.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gaisnet.errors import DataError

MAX_BYTES = 2**28
"""Most bytes of a file's values, unpacked. MNIST has 47 million."""

_UINT8 = 0x08  # the format's code for unsigned bytes


def read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """Read unsigned bytes in ``num_dims`` dimensions from a file, gzipped if its name ends in ``.gz``.

    Raises ``DataError``.
    """
    asked = f"IDX file '{path}'"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _shape(file.read(4 * (1 + num_dims)), num_dims, asked)
            size_bytes = math.prod(shape)
            if size_bytes > MAX_BYTES:
                do = f"give one of at most {MAX_BYTES}"
                raise DataError(asked, f"says that it holds {' x '.join(map(str, shape))} bytes", do)
            values = file.read(size_bytes + 1)
    except FileNotFoundError as error:
        raise DataError(
            asked, "there is no such file", "look at the folder's name, or copy the data set again"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(asked, f"cannot be read ({error})", "copy it again, as this user") from error
    if len(values) != size_bytes:
        found = f"says that {size_bytes} bytes follow, but there are {'fewer' if len(values) < size_bytes else 'more'}"
        raise DataError(asked, found, "copy it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _shape(header: bytes, num_dims: int, asked: str) -> tuple[int, ...]:
    if header[:4] != bytes((0, 0, _UINT8, num_dims)) or len(header) != 4 * (1 + num_dims):
        found = f"does not begin as one of unsigned bytes in {num_dims} dimensions does"
        raise DataError(asked, found, "give a file of MNIST's format, images and labels not interchanged")
    return tuple(np.frombuffer(header, ">u4", offset=4).tolist())
