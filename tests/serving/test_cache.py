"""A session's keys and values: written in place, grown by blocks, cropped."""

import torch
from torch import Tensor
from transformers import LlamaConfig

from gaisnet.serving.engine.rows import BLOCK, KVCache, bytes_per_position, in_blocks


def some(num_positions: int, seed: int) -> Tensor:
    return torch.randn(2, num_positions, 8, generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_was_written_and_grows() -> None:
    cache, written = KVCache(), [some(n, n) for n in (3, BLOCK, 1)]
    for new in written:
        for layer in (4, 7):
            cache.write(layer, new, -new)
        cache.advance(new.shape[1])
    keys, values = cache.read(7, 0, cache.length)
    torch.testing.assert_close(keys, torch.cat(written, dim=1))
    torch.testing.assert_close(values, -torch.cat(written, dim=1))
    assert cache.size_bytes == 2 * 2 * 2 * 2 * BLOCK * 8 * 4  # layers, keys and values, heads, blocks


def test_what_was_cropped_is_written_over() -> None:
    cache = KVCache()
    cache.write(0, some(5, 1), some(5, 2))
    cache.advance(5)
    cache.crop(2)
    cache.crop(9)  # there are fewer
    assert cache.length == 2
    cache.write(0, some(3, 3), some(3, 4))
    keys, _ = cache.read(0, 0, 5)
    torch.testing.assert_close(keys, torch.cat([some(5, 1)[:, :2], some(3, 3)], dim=1))


def test_the_size_is_known_beforehand() -> None:
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    assert bytes_per_position(config, 3, torch.bfloat16) == 2 * 3 * 2 * 8 * 2
    assert [in_blocks(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, BLOCK, BLOCK, 2 * BLOCK]
