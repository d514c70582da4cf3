"""Quantization of rows in int8 or int4, with scales beside them.

Shape legend: D width of a row, P = ceil(D / 2) bytes, G = ceil(D / GROUP) groups.

int8: one float32 scale per row. An error is at most m / 254, m the row's largest magnitude.

int4: two numbers per byte. Every 32 of them share a scale of one byte, in 255ths of the row's scale, rounded up; the
row's is float32. Channels a hundred times larger than the others, as hidden states have them, affect their own group
only. An error is at most (g + m / 255) / 14, g the group's largest magnitude. Scales of scales are QLoRA's idea (arXiv
2305.14314); levels are even, for a provable bound.

Rounding to the nearest level gives similar numbers similar errors, which add up over steps. Stochastic rounding
(``dither``), up or down with probabilities by distance, has at most twice the error, but zero mean (Gupta et al., arXiv
1502.02551).

A number that is not finite makes its whole row NaN.
"""

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.config import TensorCode

GROUP = 32
"""Numbers that share a scale in int4."""

_TINY = torch.finfo(torch.float32).tiny
_INT8_LEVELS = 127
_INT4_LEVELS = 7
_INT4_ZERO = 8
_SCALE_LEVELS = 255
_SCALE_BYTES = 4
_BYTES: dict[TensorCode, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def dither(value: Tensor) -> Tensor:
    """Return random numbers in [0, 1) of the shape of ``value``: the same for equal values on every machine."""
    seed = zlib.crc32(value.detach().float().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return torch.rand(value.shape, generator=torch.Generator().manual_seed(seed))


def to_int8(value: Tensor, dither: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 codes of the shape of ``value`` and one float32 scale per row [..., 1] (a vector is one row)."""
    value = value.float()
    scale = value.abs().amax(dim=-1, keepdim=True) / _INT8_LEVELS if value.numel() else value[..., :1]
    codes = _rounded(value / scale.clamp(min=_TINY), dither).clamp(-_INT8_LEVELS, _INT8_LEVELS)
    return codes.to(torch.int8), scale


def from_int8(codes: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the float32 numbers of ``to_int8``, in ``out`` [..., D] if given."""
    numbers = _float32(codes.shape, codes.device) if out is None else out
    return numbers.copy_(codes).mul_(scale)


def to_int4(value: Tensor, dither: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [..., P], scales of groups uint8 [..., G], of rows float32 [..., 1] of ``value`` [..., D]."""
    value = value.float()
    row = value.abs().amax(dim=-1, keepdim=True) if value.numel() else value[..., :1]
    grouped = _in_groups(value)
    largest = grouped.abs().amax(dim=-1)
    shares = (largest / row.clamp(min=_TINY) * _SCALE_LEVELS).ceil().nan_to_num(_SCALE_LEVELS).clamp(0, _SCALE_LEVELS)
    scale = (shares / _SCALE_LEVELS * row).unsqueeze(-1) / _INT4_LEVELS
    levels = _rounded(grouped / scale.clamp(min=_TINY), None if dither is None else _in_groups(dither))
    codes = levels.nan_to_num(0).clamp(-_INT4_LEVELS, _INT4_LEVELS) + _INT4_ZERO
    flat = codes.to(torch.uint8).flatten(-2)[..., : value.shape[-1]]
    flat = F.pad(flat, (0, flat.shape[-1] % 2), value=_INT4_ZERO)
    return flat[..., ::2] | flat[..., 1::2] << 4, shares.to(torch.uint8), row


def from_int4(codes: Tensor, shares: Tensor, row: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """Return the float32 numbers [..., D] of ``to_int4``, in ``out`` [..., G * GROUP] if given."""
    rows, groups = codes.shape[:-1], num_groups(width)
    filled = _float32((*rows, groups * GROUP), codes.device) if out is None else out
    pairs = filled.view(*rows, groups * GROUP // 2, 2)[..., : num_bytes(width), :]
    pairs[..., 0], pairs[..., 1] = codes & 15, codes >> 4
    scale = (shares.float() / _SCALE_LEVELS * row).unsqueeze(-1) / _INT4_LEVELS
    filled.view(*rows, groups, GROUP).sub_(_INT4_ZERO).mul_(scale)
    return filled[..., :width]


def num_groups(width: int) -> int:
    """Return the number of scales of a row in int4."""
    return -(-width // GROUP)


def num_bytes(width: int) -> int:
    """Return the bytes of a row's codes in int4."""
    return -(-width // 2)


def row_bytes(width: int, code: TensorCode) -> int:
    """Return the bytes of a row of ``width`` numbers in ``code``, with its scales."""
    if code == "int8":
        return width + _SCALE_BYTES
    if code == "int4":
        return num_bytes(width) + num_groups(width) + _SCALE_BYTES
    return width * _BYTES[code]


def _rounded(levels: Tensor, dither: Tensor | None) -> Tensor:
    return levels.round() if dither is None else (levels + dither).floor()


def _in_groups(value: Tensor) -> Tensor:
    """Reshape [..., D] to [..., G, GROUP], the last group padded with zeros."""
    width = value.shape[-1]
    filled = F.pad(value, (0, num_groups(width) * GROUP - width))
    return filled.reshape(*value.shape[:-1], num_groups(width), GROUP)


def _float32(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device=device)
