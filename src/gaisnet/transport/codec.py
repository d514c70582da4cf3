"""Messages to bytes and back.

A frame is a safetensors file in memory: eight bytes of header length, a JSON header that names each tensor's dtype,
shape and place, and the raw numbers. The version, the message's name and its plain fields
are in the header's metadata. Nothing is
pickled; every size is checked against the frame before a tensor is made.

Floating tensors are written as the settings under ``wire`` say. Error bounds, per number x of a row with largest
magnitude m: float16 2**-11 |x| (down to 2**-25 absolute), bfloat16 2**-8 |x|, int8 m / 254, int4 (g + m / 255) / 14
with g the largest magnitude of 32 numbers; int8 and int4 twice as much where they round by chance.
"""

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from gaisnet.config import TensorCode, WireSettings
from gaisnet.errors import WireFormatError, WireVersion
from gaisnet.messages import Message
from gaisnet.row_quant import GROUP, dither, from_int4, from_int8, num_bytes, num_groups, to_int4, to_int8
from gaisnet.transport.packed import Packed, read_tensors

WIRE_VERSION = "1"
"""Version of messages on a link; raised with every change that an older release would misread."""
_SCALE = "#scale"
_GROUPS = "#groups"
_WIDTH = "#width"
_BESIDE = (_SCALE, _GROUPS, _WIDTH)
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 2**24
_MAX_FRAME_BYTES = 2**26
_CHUNK_HEADER_BYTES = 2**10  # more than the header of a ``Chunk``
_MOST_DIGITS = len(str(-(2**63)))
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in Message.__subclasses__()}
B = TypeVar("B", bytes, mmap.mmap)
_ADAPTERS = {name: TypeAdapter(cls) for name, cls in _TYPES.items()}


class Codec:
    """Encodes and decodes frames with one set of wire settings.

    Both ends may differ, since frames are self-describing.
    """

    def __init__(self, settings: WireSettings) -> None:
        self._settings = settings

    @property
    def frame_bytes(self) -> int:
        """Longest frame of a message; a longer one crosses in chunks, so that others get through between them."""
        return min(self._settings.max_message_bytes, _MAX_FRAME_BYTES)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a message per chunk, whose own frame fits ``frame_bytes``."""
        return self.frame_bytes - _CHUNK_HEADER_BYTES

    @property
    def max_transfer_bytes(self) -> int:
        """Longest message."""
        return self._settings.max_transfer_bytes

    def encode(self, message: Message) -> bytes:
        """Encode ``message`` as a frame."""
        return self.pack(message).whole()

    def pack(self, message: Message) -> Packed:
        """Describe ``message`` as a frame without building it; only tensors in another code are copied."""
        tensors: dict[str, Tensor] = {}
        plain: dict[str, Any] = {}
        for declared in fields(message):
            value = getattr(message, declared.name)
            if isinstance(value, Tensor):
                self._pack(tensors, declared.name, value, declared)
            elif isinstance(value, dict):
                for key, tensor in value.items():
                    self._pack(tensors, f"{declared.name}/{key}", tensor, declared)
            else:
                plain[declared.name] = value
        # A loss of NaN must cross, so that the receiver can name the step; Python's JSON reads what it writes.
        metadata = {"version": WIRE_VERSION, "message": type(message).__name__, "fields": json.dumps(plain)}
        return Packed(tensors, metadata)

    def decode(self, frame: bytes) -> Message:
        """Decode a frame; floating tensors become float32. Raises ``WireFormatError``."""
        return self._decode(frame, safetensors.torch.load, self._settings.max_message_bytes)

    def decode_long(self, memory: mmap.mmap) -> Message:
        """Decode a frame that came in chunks; tensors that need not be widened stay in place."""
        return self._decode(memory, read_tensors, self._settings.max_transfer_bytes)

    def _decode(self, frame: B, load: Callable[[B], dict[str, Tensor]], limit: int) -> Message:
        name, values = _read_header(frame, limit)
        try:
            tensors = load(frame)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise WireFormatError(f"no tensors ({error})") from error
        try:
            values.update(_gather(tensors, _TYPES[name]))
            message: Message = _ADAPTERS[name].validate_python(values)
        except (ValidationError, ValueError) as error:
            raise WireFormatError(f"a {name} with wrong fields ({error})") from error
        return message

    def _pack(self, tensors: dict[str, Tensor], name: str, value: Tensor, declared: Field[Any]) -> None:
        setting = declared.metadata.get("wire")
        if setting is None or not value.is_floating_point():
            tensors[name] = value
            return
        value = value.detach().cpu().contiguous()
        code: TensorCode = getattr(self._settings, setting)
        if code == "int4" and declared.metadata["short_whole"] and value.shape[-1] < GROUP:
            code = "float32"
        by_chance = dither(value) if self._settings.rounding(setting) == "stochastic" else None
        if code == "int8":
            tensors[name], tensors[name + _SCALE] = to_int8(value, by_chance)
        elif code == "int4":
            tensors[name], tensors[name + _GROUPS], tensors[name + _SCALE] = to_int4(value, by_chance)
            tensors[name + _WIDTH] = torch.tensor(value.shape[-1], dtype=torch.int32)
        else:
            tensors[name] = value.to(_DTYPES[code])


def _read_header(frame: bytes | mmap.mmap, limit: int) -> tuple[str, dict[str, Any]]:
    size = len(frame)
    if not _LENGTH_BYTES < size <= limit:
        raise WireFormatError(f"{size} bytes, the limit is {limit}")
    header_bytes = int.from_bytes(frame[:_LENGTH_BYTES], "little")
    if header_bytes > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise WireFormatError(f"a header of {header_bytes} bytes in a frame of {size}")
    try:
        metadata = json.loads(frame[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes])["__metadata__"]
        version = metadata.get("version", "0")  # the first releases wrote none
        if version != WIRE_VERSION:
            raise WireVersion(str(version)[:20], WIRE_VERSION)
        name, values = metadata["message"], json.loads(metadata["fields"], parse_int=_whole)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireFormatError(f"no message header ({error!r})") from error
    if not isinstance(name, str) or name not in _TYPES or not isinstance(values, dict):
        raise WireFormatError(f"an unknown message {name!r}")
    return name, values


def _whole(digits: str) -> int:
    """Check an integer of 64 bits. Raises ``ValueError`` for a longer one: arithmetic with floats would overflow."""
    if len(digits) > _MOST_DIGITS or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"a whole number of {len(digits)} digits, which 64 bits cannot hold")
    return int(digits)


def _gather(tensors: dict[str, Tensor], cls: type[Message]) -> dict[str, Any]:
    """Put tensors back into the message's fields: ``field/key`` into a dictionary, coded ones widened to float32."""
    coded = {declared.name for declared in fields(cls) if "wire" in declared.metadata}
    values: dict[str, Any] = {declared.name: {} for declared in fields(cls) if declared.type == dict[str, Tensor]}
    for name, tensor in tensors.items():
        owner, _, key = name.partition("/")
        whole, _, part = name.partition("#")
        if owner.partition("#")[0] in coded:
            if part and whole in tensors:
                continue  # belongs to another tensor, and is read with it
            tensor = _widened(name, tensor, {p: tensors[name + p] for p in _BESIDE if name + p in tensors})
        if key and isinstance(values.get(owner), dict):
            values[owner][key] = tensor
        else:
            values[name] = tensor
    return values


def _widened(name: str, tensor: Tensor, beside: Mapping[str, Tensor]) -> Tensor:
    """Return the float32 numbers of a tensor as ``_pack`` wrote it."""
    if not beside:
        if tensor.dtype not in _DTYPES.values():
            raise WireFormatError(f"'{name}' in {tensor.dtype} without scales")
        return tensor.float()
    scale = beside.get(_SCALE)
    if scale is None or scale.dtype != torch.float32:
        raise WireFormatError(f"'{name}' with {'no scales of rows' if scale is None else scale.dtype} beside it")
    if scale.shape != (*tensor.shape[:-1], 1):
        raise WireFormatError(f"scales of shape {tuple(scale.shape)} for '{name}' {tuple(tensor.shape)}")
    if set(beside) == {_SCALE}:
        if tensor.dtype != torch.int8:
            raise WireFormatError(f"'{name}' in {tensor.dtype} with scales of rows")
        return from_int8(tensor, scale)
    if set(beside) != set(_BESIDE):
        raise WireFormatError(f"'{name}' with {' and '.join(sorted(beside))} only")
    return _widened_int4(name, tensor, scale, beside[_GROUPS], beside[_WIDTH])


def _widened_int4(name: str, tensor: Tensor, scale: Tensor, groups: Tensor, width: Tensor) -> Tensor:
    if width.shape != () or width.dtype != torch.int32 or tensor.dtype != torch.uint8 or groups.dtype != torch.uint8:
        raise WireFormatError(f"'{name}' in {tensor.dtype}, scales of groups in {groups.dtype}")
    size, rows = int(width), tuple(tensor.shape[:-1])
    if size < 0 or tensor.shape != (*rows, num_bytes(size)) or groups.shape != (*rows, num_groups(size)):
        raise WireFormatError(f"'{name}' {tuple(tensor.shape)}, scales {tuple(groups.shape)} for rows of {size}")
    return from_int4(tensor, groups, scale, size)
