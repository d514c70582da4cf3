"""Reading of examples from JSONL files: prompt and completion, text and label, or image and label on each line.

Images are files in the folder of the JSONL file, or below it. They are not resized. Pixels are as from ViT's image
processor with a mean and a standard deviation of 0.5: floats [channels, height, width] between -1 and 1. There is one
channel for files that Pillow reads as grey (modes 1, L and LA), and three for others. Transparency is dropped, and only
the first frame is read. Channels have 8 bits: Pillow rounds deeper colours to these, but would clip deeper greys, so
these are refused.
"""

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gaisnet.data.examples import Example, Input, Labelled
from gaisnet.errors import DataError
from gaisnet.strict_json import loads

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")  # Pillow runs external programs for some others
_GREY = ("1", "L", "LA")  # modes of Pillow with at most 8 bits per channel
_COLOUR = ("P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MOST_PIXELS = 4096 * 4096
_LONGEST = 60  # most characters of a value in a message
_EXAMPLES = {"prompt": ("prompt", "completion"), "text": ("text", "label"), "image": ("image", "label")}
_INPUTS = {"text": ("text",), "image": ("image",)}


def read_examples(path: Path, owner: str) -> tuple[Example | Labelled, ...]:
    """Read a device's examples, at least one. Raises ``DataError`` with the line of the mistake."""
    asked = f"examples '{path}' of device '{owner}'"
    lines = _lines(path, asked, "put train.jsonl and test.jsonl in the data folder, or name it anew")
    if not lines:
        raise DataError(asked, "device without examples", "write at least one line of prompt and completion")
    return tuple(_example(line, where, path.parent) for where, line in lines)


def examples_from_rows(rows: Iterable[Any], owner: str, split: str) -> tuple[Example | Labelled, ...]:
    """Return a device's examples from rows in memory, with the checks of files.

    Args:
        rows: Mappings with the keys of a JSONL line, such as those of a Hugging Face dataset, or pairs of prompt and
            completion. Images are paths below the current directory.
        owner: Name of the device.
        split: Name of the set, for errors.

    Raises:
        DataError: No rows, or a mistake in one; the row is named.
    """
    asked = f"{split} examples of device '{owner}'"
    found = []
    for number, row in enumerate(rows):
        where = f"{asked}, row {number}"
        if isinstance(row, tuple) and len(row) == 2:
            row = dict(zip(_EXAMPLES["prompt"], row, strict=True))
        if not isinstance(row, Mapping):
            do = "give a mapping with the keys of a JSONL line, or a pair of prompt and completion"
            raise DataError(where, f"is a {type(row).__name__}", do)
        found.append(_example_of(_checked(dict(row), where, _EXAMPLES), where, Path.cwd()))
    if not found:
        raise DataError(asked, "there are none", "give at least one")
    return tuple(found)


def read_inputs(path: Path) -> tuple[Input, ...]:
    """Read texts or images without labels, at least one. Raises ``DataError``."""
    asked = f"public inputs '{path}'"
    lines = _lines(path, asked, "correct model.public_inputs")
    if not lines:
        raise DataError(asked, "there are none in it", "write at least one line, or remove model.public_inputs")
    return tuple(_input_of(_fields(line, where, _INPUTS), where, path.parent) for where, line in lines)


def _lines(path: Path, asked: str, do: str) -> list[tuple[str, str]]:
    """Return the lines of a file that are not blank, each with its location."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows may write a byte order mark
    except FileNotFoundError as error:
        raise DataError(asked, "there is no such file", do) from error
    except OSError as error:
        raise DataError(asked, f"cannot be read ({error})", "let this user read it") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        found = f"cannot be read (line {line} is not UTF-8: {error.reason})"
        raise DataError(asked, found, "save it as UTF-8") from error
    # Not splitlines, which also splits at characters that JSON allows within a string.
    return [(f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _example(line: str, where: str, folder: Path) -> Example | Labelled:
    return _example_of(_fields(line, where, _EXAMPLES), where, folder)


def _example_of(raw: dict[str, str], where: str, folder: Path) -> Example | Labelled:
    if "prompt" in raw:
        return Example(raw["prompt"], raw["completion"])
    return Labelled(_input_of(raw, where, folder), raw["label"])


def _input_of(raw: dict[str, str], where: str, folder: Path) -> Input:
    return _pixels(_picture(raw["image"], folder, where), where) if "image" in raw else raw["text"]


def _fields(line: str, where: str, kinds: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Parse a line into keys and text values."""
    do = _how_to_write(next(iter(kinds.values())))
    try:
        raw = loads(line)
    except ValueError as error:
        raise DataError(where, f"is not valid JSON ({error})", do) from error
    if not isinstance(raw, dict):
        raise DataError(where, f"is a {type(raw).__name__}, not an object", do)
    return _checked(raw, where, kinds)


def _checked(raw: dict[str, Any], where: str, kinds: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Return keys and text values of an example. The first known key decides its kind."""
    kind = next((names for key, names in kinds.items() if key in raw), next(iter(kinds.values())))
    missing, unknown = set(kind) - raw.keys(), raw.keys() - set(kind)
    if missing:
        raise DataError(where, f"lacks {_quoted(missing)}", _how_to_write(kind))
    if unknown:
        raise DataError(where, f"has unknown keys: {_quoted(unknown)}", _how_to_write(kind))
    for key, value in raw.items():
        _check_text(key, value, where)
    return raw


def _how_to_write(kind: tuple[str, ...]) -> str:
    inside = ", ".join(f'"{name}": "..."' for name in kind)
    return f"write {{{inside}}}"


def _check_text(key: str, value: Any, where: str) -> None:
    if isinstance(value, dict | list) or value is None:
        raise DataError(where, f"'{key}' is {_shortened(value)}, not text", "write a string")
    if not isinstance(value, str):
        raise DataError(where, f"'{key}' is {_shortened(value)}, not text", f'quote it: "{_shortened(value)}"')
    if not value.strip():
        raise DataError(where, f"'{key}' is empty", "write some text, or remove the line")


def _shortened(value: Any) -> str:
    """Format a JSON value, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _picture(name: str, folder: Path, where: str) -> Path:
    """Resolve the file that a line names. Raises ``DataError`` unless it is below the folder."""
    do = "name a picture by its path from the folder of this file, in it or below"
    try:
        path = (folder / name).resolve()
        inside = ".." not in Path(name).parts and not Path(name).is_absolute() and path.is_relative_to(folder.resolve())
        is_file = inside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(where, f"'image' is no path ({error})", do) from error
    if not inside:
        raise DataError(where, f"'image' is '{name}', which leads out of the folder of this file", do)
    if not is_file:
        raise DataError(where, f"'image' is '{name}', which is no file", do)
    return path


def _pixels(path: Path, where: str) -> Tensor:
    try:
        levels = _levels(path, where)
    except DataError:
        raise
    except Exception as error:  # any class: Pillow passes on whatever its decoders raise for a broken file
        found = f"'image' cannot be read ({type(error).__name__}: {error})"
        raise DataError(where, found, f"name a picture that is whole, as one of: {', '.join(_FORMATS)}") from error
    pixels = torch.from_numpy(levels).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _levels(path: Path, where: str) -> NDArray[np.uint8]:
    """Read levels from 0 to 255, [height, width] if grey, otherwise [height, width, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            _check_picture(image, where)
            return np.array(image.convert("L" if image.mode in _GREY else "RGB"))


def _check_picture(image: Image.Image, where: str) -> None:
    """Check size and mode in the file's header, before any pixel is decoded. Raises ``DataError``."""
    if image.width * image.height > _MOST_PIXELS:
        found = f"'image' has {image.width} by {image.height} pixels, more than {_MOST_PIXELS} in all"
        raise DataError(where, found, "resize it to the model's size")
    if image.mode not in _GREY + _COLOUR:
        found = f"'image' has pixels of Pillow's mode '{image.mode}'"
        raise DataError(where, found, "save it in grey or RGB with 8 bits a channel, scaled to 0..255")
