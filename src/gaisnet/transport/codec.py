"""Messages to bytes and back.

A frame is a safetensors file in memory: eight bytes of header length, a JSON header that names each tensor's dtype,
shape and place, and the raw numbers. The message's name and its plain fields stand in the header's metadata. Nothing is
pickled; every size is checked against the frame before a tensor is made.

Floating tensors are written as the settings under ``wire`` say. Error bounds, per number x of a row with largest
magnitude m: float16 2**-11 |x| (down to 2**-25 absolute), bfloat16 2**-8 |x|, int8 m / 254.
"""

import json
from dataclasses import Field, fields
from typing import Any

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from gaisnet.config import TensorCode, WireSettings
from gaisnet.errors import WireFormatError
from gaisnet.messages import Message

_SCALE = "#scale"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 2**24
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_INT8_LEVELS = 127
_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in Message.__subclasses__()}
_ADAPTERS = {name: TypeAdapter(cls) for name, cls in _TYPES.items()}


class Codec:
    """Writes and reads frames with one set of wire settings; both ends may differ, frames say what they hold."""

    def __init__(self, settings: WireSettings) -> None:
        self._settings = settings

    def encode(self, message: Message) -> bytes:
        """The frame of ``message``."""
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
        # A loss that is NaN must cross, so that the receiver can name the step; Python's JSON reads what it writes.
        metadata = {"message": type(message).__name__, "fields": json.dumps(plain)}
        return safetensors.torch.save(tensors, metadata)

    def decode(self, frame: bytes) -> Message:
        """The message of a frame. Raises ``WireFormatError`` where it is not one; floating tensors become float32."""
        name, values = self._read_header(frame)
        try:
            tensors = safetensors.torch.load(frame)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise WireFormatError(f"no tensors ({error})") from error
        try:
            values.update(_gather(tensors, _TYPES[name]))
            message: Message = _ADAPTERS[name].validate_python(values)
        except (ValidationError, ValueError) as error:
            raise WireFormatError(f"a {name} with wrong fields ({error})") from error
        return message

    def _pack(self, tensors: dict[str, Tensor], name: str, value: Tensor, declared: Field[Any]) -> None:
        value = value.detach().cpu().contiguous()
        setting = declared.metadata.get("wire")
        if setting is None or not value.is_floating_point():
            tensors[name] = value
            return
        code: TensorCode = getattr(self._settings, setting)
        if code == "int8":
            tensors[name], tensors[name + _SCALE] = quantize_rows(value)
        else:
            tensors[name] = value.to(_DTYPES[code])

    def _read_header(self, frame: bytes) -> tuple[str, dict[str, Any]]:
        size = len(frame)
        if not _LENGTH_BYTES < size <= self._settings.max_message_bytes:
            raise WireFormatError(f"{size} bytes, the limit is {self._settings.max_message_bytes}")
        header_bytes = int.from_bytes(frame[:_LENGTH_BYTES], "little")
        if header_bytes > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise WireFormatError(f"a header of {header_bytes} bytes in a frame of {size}")
        try:
            metadata = json.loads(frame[_LENGTH_BYTES : _LENGTH_BYTES + header_bytes])["__metadata__"]
            name, values = metadata["message"], json.loads(metadata["fields"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WireFormatError(f"no message header ({error!r})") from error
        if not isinstance(name, str) or name not in _TYPES or not isinstance(values, dict):
            raise WireFormatError(f"an unknown message {name!r}")
        return name, values


def quantize_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of the shape of ``value`` and one float32 scale per row [..., 1] (a vector is one row)."""
    value = value.float()
    scale = value.abs().amax(dim=-1, keepdim=True) / _INT8_LEVELS if value.numel() else value[..., :1]
    codes = (value / scale.clamp(min=torch.finfo(torch.float32).tiny)).round()
    return codes.to(torch.int8), scale


def dequantize_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 numbers of ``quantize_rows``."""
    return codes.float() * scale


def _gather(tensors: dict[str, Tensor], cls: type[Message]) -> dict[str, Any]:
    """Tensors back into the fields of their message: ``field/key`` into a dictionary, coded ones widened to float32."""
    coded = {declared.name for declared in fields(cls) if "wire" in declared.metadata}
    values: dict[str, Any] = {declared.name: {} for declared in fields(cls) if declared.type == dict[str, Tensor]}
    for name, tensor in tensors.items():
        owner, _, key = name.partition("/")
        if owner.removesuffix(_SCALE) in coded:
            if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
                continue
            tensor = _widened(name, tensor, tensors.get(name + _SCALE))
        if key and isinstance(values.get(owner), dict):
            values[owner][key] = tensor
        else:
            values[name] = tensor
    return values


def _widened(name: str, tensor: Tensor, scale: Tensor | None) -> Tensor:
    """float32 numbers of a tensor as ``_pack`` wrote it."""
    if scale is None:
        if tensor.dtype not in _DTYPES.values():
            raise WireFormatError(f"'{name}' in {tensor.dtype} without scales")
        return tensor.float()
    if tensor.dtype != torch.int8 or scale.dtype != torch.float32:
        raise WireFormatError(f"'{name}' in {tensor.dtype} with scales in {scale.dtype}")
    if scale.shape != (*tensor.shape[:-1], 1):
        raise WireFormatError(f"scales of shape {tuple(scale.shape)} for '{name}' {tuple(tensor.shape)}")
    return dequantize_rows(tensor, scale)
