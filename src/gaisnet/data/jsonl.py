"""Examples out of JSONL files: prompt and completion, text and label, or image and label, one on each line.

Images are files in the folder of theirs, or below it. They are not resized, and become what ViT's own image processor
makes of them with a mean and a standard deviation of 0.5: float pixels [channels, height, width] between -1 and 1. One
channel where Pillow reads a file as grey (modes 1, L and LA), three elsewhere. Transparency is left out, and of several
frames the first is read. There are 8 bits a channel: deeper colours lose their finest levels as Pillow decodes them,
but deeper greys, which it would clip, are refused.
"""

import json
import warnings
from collections.abc import Mapping
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

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")  # Pillow runs a program for some others
_GREY = ("1", "L", "LA")  # modes of Pillow's, 8 bits a channel or fewer
_COLOUR = ("P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_MOST_PIXELS = 4096 * 4096
_LONGEST = 60  # characters of a value in a message
_EXAMPLES = {"prompt": ("prompt", "completion"), "text": ("text", "label"), "image": ("image", "label")}
_INPUTS = {"text": ("text",), "image": ("image",)}


def read_examples(path: Path, owner: str) -> tuple[Example | Labelled, ...]:
    """Examples of a device, at least one. Raises ``DataError``, with the line where one is wrong."""
    asked = f"examples '{path}' of device '{owner}'"
    lines = _lines(path, asked, "put train.jsonl and test.jsonl in the data folder, or name it anew")
    if not lines:
        raise DataError(asked, "device without examples", "write at least one line of prompt and completion")
    return tuple(_example(line, where, path.parent) for where, line in lines)


def read_inputs(path: Path) -> tuple[Input, ...]:
    """Texts or images without labels, at least one. Raises ``DataError``."""
    asked = f"public inputs '{path}'"
    lines = _lines(path, asked, "correct model.public_inputs")
    if not lines:
        raise DataError(asked, "there are none in it", "write at least one line, or remove model.public_inputs")
    return tuple(_input_of(_fields(line, where, _INPUTS), where, path.parent) for where, line in lines)


def _lines(path: Path, asked: str, do: str) -> list[tuple[str, str]]:
    """Lines of a file that are not blank, each behind its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows begin a file with a mark
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
    raw = _fields(line, where, _EXAMPLES)
    if "prompt" in raw:
        return Example(raw["prompt"], raw["completion"])
    return Labelled(_input_of(raw, where, folder), raw["label"])


def _input_of(raw: dict[str, str], where: str, folder: Path) -> Input:
    return _pixels(_picture(raw["image"], folder, where), where) if "image" in raw else raw["text"]


def _fields(line: str, where: str, kinds: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Keys and values of a line, all of them text. The kind is that of the first key that is there, or of all."""
    kind = next(iter(kinds.values()))
    do = _how_to_write(kind)
    try:
        raw = loads(line)
    except ValueError as error:
        raise DataError(where, f"is not valid JSON ({error})", do) from error
    if not isinstance(raw, dict):
        raise DataError(where, f"is a {type(raw).__name__}, not an object", do)
    kind = next((names for key, names in kinds.items() if key in raw), kind)
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
        raise DataError(where, f"'{key}' is {_said(value)}, not text", "write a string")
    if not isinstance(value, str):
        raise DataError(where, f"'{key}' is {_said(value)}, not text", f'quote it: "{_said(value)}"')
    if not value.strip():
        raise DataError(where, f"'{key}' is empty", "write some text, or remove the line")


def _said(value: Any) -> str:
    """A value of JSON, shortened."""
    said = json.dumps(value)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


def _quoted(names: set[str]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(names))


def _picture(name: str, folder: Path, where: str) -> Path:
    """The file that a line names, links followed. Raises ``DataError`` unless it is below the folder."""
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
    except Exception as error:  # of many classes, for Pillow lets through what a broken file makes its decoders raise
        found = f"'image' cannot be read ({type(error).__name__}: {error})"
        raise DataError(where, found, f"name a picture that is whole, as one of: {', '.join(_FORMATS)}") from error
    pixels = torch.from_numpy(levels).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _levels(path: Path, where: str) -> NDArray[np.uint8]:
    """From 0 to 255, [height, width] if grey, otherwise [height, width, 3]."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as image:
            _check_picture(image, where)
            return np.array(image.convert("L" if image.mode in _GREY else "RGB"))


def _check_picture(image: Image.Image, where: str) -> None:
    """By what the file says of itself, before any pixel is decoded."""
    if image.width * image.height > _MOST_PIXELS:
        found = f"'image' has {image.width} by {image.height} pixels, more than {_MOST_PIXELS} in all"
        raise DataError(where, found, "resize it to the model's size")
    if image.mode not in _GREY + _COLOUR:
        found = f"'image' has pixels of Pillow's mode '{image.mode}'"
        raise DataError(where, found, "save it in grey or RGB with 8 bits a channel, scaled to 0..255")
