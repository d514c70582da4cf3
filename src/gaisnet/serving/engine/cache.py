"""Key-value cache of one session, for the layers of one part of the model.

Shape legend: H key-value heads, C capacity in positions, T new positions, K attended positions, D size of a
head. Layers have their FM numbers.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PretrainedConfig

BLOCK = 64
"""Positions by which a session's memory grows."""


@dataclass
class SessionCache:
    """A cache that grows in blocks and is written in place, so that a step copies nothing of the past."""

    length: int = 0  # positions that all layers have seen
    _keys: dict[int, Tensor] = field(default_factory=dict)  # each [H, C, D]
    _values: dict[int, Tensor] = field(default_factory=dict)

    def write(self, layer: int, keys_HTD: Tensor, values_HTD: Tensor) -> None:
        """Write new positions after a layer's past; ``advance`` makes them count."""
        stop = self.length + keys_HTD.shape[1]
        for store, new_HTD in ((self._keys, keys_HTD), (self._values, values_HTD)):
            buffer_HCD = store.get(layer)
            if buffer_HCD is None or buffer_HCD.shape[1] < stop:
                store[layer] = buffer_HCD = _grown(buffer_HCD, new_HTD, self.length, stop)
            buffer_HCD[:, self.length : stop] = new_HTD

    def read(self, layer: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return keys and values [H, K, D] of positions [first, stop) of a layer, as views."""
        return self._keys[layer][:, first:stop], self._values[layer][:, first:stop]

    def advance(self, num_positions: int) -> None:
        """Count new positions after every layer has written them."""
        self.length += num_positions

    def crop(self, length: int) -> None:
        """Drop all positions from ``length`` on."""
        self.length = min(self.length, length)

    @property
    def size_bytes(self) -> int:
        """Memory in use."""
        return sum(t.numel() * t.element_size() for t in (*self._keys.values(), *self._values.values()))


def _grown(buffer_HCD: Tensor | None, like_HTD: Tensor, length: int, stop: int) -> Tensor:
    num_heads, _, size = like_HTD.shape
    bigger = like_HTD.new_empty(num_heads, in_blocks(stop), size)
    if buffer_HCD is not None:
        bigger[:, :length] = buffer_HCD[:, :length]
    return bigger


def in_blocks(num_positions: int) -> int:
    """Return the reserved positions for a number of positions."""
    return -(-num_positions // BLOCK) * BLOCK


def bytes_per_position(config: PretrainedConfig, num_layers: int, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values for one position in this many layers."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * num_layers * int(config.num_key_value_heads) * int(size) * dtype.itemsize
