"""A frame that is never built as a whole: any part of its bytes is cut from its tensors on demand.

The bytes are those of a safetensors file, see ``transport.codec``. The header is padded so that the numbers begin at a
multiple of 64 bytes: tensors can then be used in place.
"""

import json
import math
import mmap
from bisect import bisect_right
from collections.abc import Mapping
from typing import Annotated

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from gaisnet.errors import WireFormatError

_LENGTH_BYTES = 8
_ALIGNED_BYTES = 64
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_Whole = Annotated[int, Field(ge=0, strict=True)]


class _Place(BaseModel):
    """Entry of one tensor in a header."""

    model_config = ConfigDict(extra="forbid")

    dtype: str
    shape: list[_Whole]
    data_offsets: tuple[_Whole, _Whole]


_PLACES = TypeAdapter(dict[str, _Place])


class Packed:
    """Tensors and metadata as the bytes of a safetensors file.

    Args:
        tensors: By name, on any device. They are not copied, and must not change while bytes are cut from them.
        metadata: Goes into the header.

    Attributes:
        size_bytes: Length of the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        self._tensors, self._metadata = dict(tensors), dict(metadata)
        names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
        header: dict[str, object] = {"__metadata__": self._metadata}
        self._parts, self._starts, stop = [torch.empty(0, dtype=torch.uint8)], [0], 0
        for name in names:
            start, stop = stop, stop + tensors[name].nbytes
            dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
            self._parts.append(tensors[name])
            self._starts.append(start)
        self._parts[0] = head = torch.frombuffer(bytearray(_head(header)), dtype=torch.uint8)
        self._starts[1:] = [start + len(head) for start in self._starts[1:]]
        self.size_bytes = len(head) + stop

    def whole(self) -> bytes:
        """Return the whole file, as safetensors writes it: at most ``size_bytes`` long, because it is padded less."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors.items()}
        return safetensors.torch.save(tensors, self._metadata)

    def cut(self, start: int, stop: int) -> bytearray:
        """Return bytes [start, stop)."""
        piece = bytearray(stop - start)
        for index in range(bisect_right(self._starts, start) - 1, len(self._parts)):
            begin, part = self._starts[index], self._parts[index]
            if begin >= stop:
                break
            first, last = max(start - begin, 0), min(stop - begin, part.nbytes)
            if first < last:
                flat = part.detach().reshape(-1).view(torch.uint8)
                piece[begin + first - start : begin + last - start] = flat[first:last].cpu().numpy().data
        return piece

    def snapshot(self) -> "Packed":
        """Return the same with copies of tensors, for tensors that may change."""
        return Packed({name: _copy(tensor) for name, tensor in self._tensors.items()}, self._metadata)


def read_tensors(memory: mmap.mmap) -> dict[str, Tensor]:
    """Return the tensors of a file in memory, in place: they keep ``memory`` alive. Raises ``WireFormatError``."""
    start = _LENGTH_BYTES + int.from_bytes(memory[:_LENGTH_BYTES], "little")
    try:
        header = json.loads(memory[_LENGTH_BYTES:start])
        header.pop("__metadata__", None)
        places = _PLACES.validate_python(header)
    except (ValueError, AttributeError, TypeError, RecursionError, ValidationError) as error:
        raise WireFormatError(f"no places of tensors ({error})") from error
    tensors, due = {}, 0
    for name, place in sorted(places.items(), key=lambda item: item[1].data_offsets):
        due = _check_place(name, place, due)
        tensors[name] = _view(memory, place, start)
    if start + due != len(memory):
        raise WireFormatError(f"tensors of {due} bytes behind {start} in a frame of {len(memory)}")
    return tensors


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _head(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNED_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def _check_place(name: str, place: _Place, due: int) -> int:
    """Return the start of the next tensor.

    Raises ``WireFormatError`` if this one is not at ``due``, or has another size.
    """
    (begin, end), dtype = place.data_offsets, _DTYPES.get(place.dtype)
    if dtype is None or begin != due or end - begin != math.prod(place.shape) * dtype.itemsize:
        raise WireFormatError(f"'{name}' of {place.dtype} {place.shape} at {begin} to {end}, due at {due}")
    return end


def _view(memory: mmap.mmap, place: _Place, start: int) -> Tensor:
    (begin, end), dtype = place.data_offsets, _DTYPES[place.dtype]
    if begin == end:
        return torch.empty(place.shape, dtype=dtype)
    if start + end > len(memory):
        raise WireFormatError(f"a tensor that ends at {start + end} in a frame of {len(memory)}")
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=start + begin).reshape(place.shape)
