"""One forward pass over many sessions, and their key-value caches: each adds some new positions, on some of the layers.

All positions of all sessions are rows [N, 1, D] of one batch, without padding: linear layers see them together, and
each row may have its own adapters. Only attention distinguishes sessions; it is the one step of a layer that is
replaced (``gaisnet.models.attention``).

Shape legend: N rows of all sessions, one session after the other; T rows of one session; K positions it attends to;
D hidden size, or size of a head; H attention heads, G key-value heads, R heads that share one (H = G * R), S = T * R;
C capacity of a cache in positions.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig

from gaisnet.adapters.mixing import ServedAdapters, Stack
from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.families import layer_types
from gaisnet.models.parts import Layers

BLOCK = 64
"""Positions by which a session's memory grows."""


@dataclass
class KVCache:
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


_SHORT = 512
"""Longest past of a session that is copied, to attend to several sessions in one call."""


@dataclass(frozen=True)
class BatchEntry:
    """One session's part of a forward pass."""

    rows_TD: Tensor
    cache: KVCache
    first: int  # FM layer that takes the rows
    stop: int  # FM layer to stop before
    adapters: Stack = ()


@dataclass(frozen=True)
class _Spans:
    """Rows of each session in a batch, for the attention of the layers."""

    caches: Sequence[KVCache]
    bounds: Sequence[int]  # session i has rows [bounds[i], bounds[i + 1])
    windows: dict[int, int | None]  # by layer: reach of attention, the position itself included; None for all
    device: torch.device  # of the rows
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)  # of one session
    padded_masks: dict[int | None, Tensor] = field(default_factory=dict)

    def span(self, session: int, window: int | None) -> tuple[int, int]:
        """Return the positions [first, stop) that rows of a session attend to."""
        seen = self.caches[session].length
        return first_attended(seen, window), seen + self.num_new(session)

    def num_new(self, session: int) -> int:
        """Return the number of a session's rows."""
        return self.bounds[session + 1] - self.bounds[session]

    @cached_property
    def together(self) -> list[int]:
        """Sessions with one new row and a short past, if there are several."""
        short = [i for i, cache in enumerate(self.caches) if self.num_new(i) == 1 and cache.length < _SHORT]
        return short if len(short) > 1 else []

    @cached_property
    def alone(self) -> list[int]:
        """All other sessions."""
        return sorted(set(range(len(self.caches))) - set(self.together))

    @cached_property
    def rows_together(self) -> Tensor:
        """Row numbers of the sessions in ``together``."""
        return torch.tensor([self.bounds[session] for session in self.together], device=self.device)

    def mask(self, session: int, window: int | None, repeats: int) -> Tensor | None:
        """Return the positions that a session's rows attend to, bool [T * R, K]; None for all."""
        num_new = self.num_new(session)
        if num_new == 1:
            return None  # one row attends to everything that is read for it
        if (window, session) not in self.masks:
            seen = self.caches[session].length
            first, stop = self.span(session, window)
            at_T1 = torch.arange(seen, stop, device=self.device)[:, None]
            at_K = torch.arange(first, stop, device=self.device)
            mask_TK = at_K <= at_T1
            if window is not None:
                mask_TK &= at_K > at_T1 - window
            self.masks[window, session] = mask_TK.repeat_interleave(repeats, dim=0)
        return self.masks[window, session]

    def padded_mask(self, window: int | None) -> Tensor:
        """Return the positions without padding for the sessions in ``together``, bool [B, 1, 1, K]."""
        if window not in self.padded_masks:
            spans = (self.span(session, window) for session in self.together)
            lengths = [stop - first for first, stop in spans]
            at_K = torch.arange(max(lengths), device=self.device)
            lengths_B1 = torch.tensor(lengths, device=self.device)[:, None]
            self.padded_masks[window] = (at_K < lengths_B1)[:, None, None]
        return self.padded_masks[window]


class BatchedLayers:
    """Runs layers over the rows of many sessions; other callers of the layers are not affected.

    Args:
        layers: Part of a model; may be empty.
        adapters: Adapters served on it; None for none.
    """

    def __init__(self, layers: Layers, adapters: ServedAdapters | None = None) -> None:
        self._layers = layers
        self._adapters = adapters
        self._windows = {index: _window(layers.config, index) for index in layers.indices}
        let_attention_be_replaced(layers.layers)

    @property
    def indices(self) -> list[int]:
        """FM numbers of the layers."""
        return self._layers.indices

    @torch.no_grad()
    def run_sessions(self, shares: Sequence[BatchEntry]) -> list[Tensor]:
        """Return output rows [T, D] of every session, whose caches then hold the new positions.

        After an error the caches are unchanged.
        """
        lengths = [len(share.rows_TD) for share in shares]
        rows_ND = torch.cat([share.rows_TD for share in shares])
        positions_N1 = torch.cat(
            [torch.arange(s.cache.length, s.cache.length + n) for s, n in zip(shares, lengths, strict=True)]
        ).to(rows_ND.device)[:, None]
        outputs = list(rows_ND.split(lengths))
        positions = positions_N1.split(lengths)
        for start, stop in pairwise(sorted({edge for share in shares for edge in (share.first, share.stop)})):
            chosen = [i for i, share in enumerate(shares) if share.first <= start and stop <= share.stop]
            if chosen and (layers := [index for index in self.indices if start <= index < stop]):
                rows_N1D = torch.cat([outputs[i] for i in chosen])[:, None]
                at_N1 = torch.cat([positions[i] for i in chosen])
                rows_N1D = self._segment(layers, rows_N1D, at_N1, [shares[i] for i in chosen])
                for i, new_TD in zip(chosen, rows_N1D[:, 0].split([lengths[i] for i in chosen]), strict=True):
                    outputs[i] = new_TD
        for share, num_new in zip(shares, lengths, strict=True):
            share.cache.advance(num_new)
        return outputs

    def _segment(self, layers: list[int], rows_N1D: Tensor, at_N1: Tensor, shares: Sequence[BatchEntry]) -> Tensor:
        """Run layers that all these sessions share."""
        bounds = [0]
        for share in shares:
            bounds.append(bounds[-1] + len(share.rows_TD))
        spans = _Spans([share.cache for share in shares], bounds, self._windows, rows_N1D.device)
        rotary = self._layers.rotary_emb(rows_N1D, position_ids=at_N1)
        stacks = [share.adapters for share in shares for _ in share.rows_TD]
        with nullcontext() if self._adapters is None else self._adapters.for_rows(stacks):
            for index in layers:
                rows_N1D = self._layers.layers[str(index)](
                    rows_N1D,
                    attention_mask=None,
                    position_ids=at_N1,
                    position_embeddings=rotary,
                    use_cache=False,
                    attend=partial(_attend, spans),
                )
        return rows_N1D


def first_attended(seen: int, window: int | None) -> int:
    """Return the earliest position that the first of the new rows attends to."""
    return 0 if window is None else max(0, seen - window + 1)


def _window(config: PretrainedConfig, layer: int) -> int | None:
    return int(config.sliding_window) if layer_types(config)[layer] == "sliding_attention" else None


def _attend(
    sessions: _Spans, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers asks, [N, H, 1, D] -> [N, 1, H, D]; rows reach their own session's past only."""
    layer, scale = int(module.layer_idx), kwargs.get("scaling")  # type: ignore[arg-type]
    key_NGD, value_NGD = key[:, :, 0], value[:, :, 0]
    num_rows, num_kv, size = key_NGD.shape
    # Heads that share a key-value head become its rows, so that keys and values need not be repeated.
    query_NGRD = query[:, :, 0].reshape(num_rows, num_kv, -1, size)
    result_NGRD = torch.empty_like(query_NGRD)
    for cache, (first, stop) in zip(sessions.caches, pairwise(sessions.bounds), strict=True):
        cache.write(layer, key_NGD[first:stop].transpose(0, 1), value_NGD[first:stop].transpose(0, 1))
    for session in sessions.alone:
        first, stop = sessions.bounds[session], sessions.bounds[session + 1]
        result_NGRD[first:stop] = _attend_alone(sessions, session, layer, query_NGRD[first:stop], scale)
    if sessions.together:
        rows_B = sessions.rows_together
        result_NGRD[rows_B] = _attend_together(sessions, layer, query_NGRD[rows_B], scale)
    return result_NGRD.view(num_rows, 1, -1, size), None


def _attend_alone(sessions: _Spans, session: int, layer: int, query_TGRD: Tensor, scale: float | None) -> Tensor:
    """Return attention [T, G, R, D] of one session's rows, on views of its past."""
    num_new, num_kv, repeats, size = query_TGRD.shape
    window = sessions.windows[layer]
    first, stop = sessions.span(session, window)
    keys_GKD, values_GKD = sessions.caches[session].read(layer, first, stop)
    if num_new == 1 or (first, num_new) == (0, stop) and (window is None or window >= stop):
        # As transformers asks: another order of the sum changes the last bit, which int8 layers can amplify.
        found_HTD = scaled_dot_product_attention(
            query_TGRD.flatten(1, 2).transpose(0, 1)[None],
            keys_GKD[None],
            values_GKD[None],
            is_causal=num_new > 1,
            scale=scale,
            enable_gqa=True,
        )[0]
        return found_HTD.transpose(0, 1).reshape(num_new, num_kv, repeats, size)
    rows_GSD = query_TGRD.transpose(0, 1).flatten(1, 2)
    found_GSD = scaled_dot_product_attention(  # the fused kernel takes four dimensions only
        rows_GSD[None], keys_GKD[None], values_GKD[None], attn_mask=sessions.mask(session, window, repeats), scale=scale
    )[0]
    return found_GSD.reshape(num_kv, num_new, repeats, size).transpose(0, 1)


def _attend_together(sessions: _Spans, layer: int, query_BGRD: Tensor, scale: float | None) -> Tensor:
    """Return attention [B, G, R, D] of sessions with one row each, in one call on padded copies of their pasts."""
    window = sessions.windows[layer]
    pasts = [sessions.caches[i].read(layer, *sessions.span(i, window)) for i in sessions.together]
    keys_BGKD, values_BGKD = (
        pad_sequence([past_GKD.transpose(0, 1) for past_GKD in each], batch_first=True).transpose(1, 2)
        for each in zip(*pasts, strict=True)
    )
    mask_B11K = sessions.padded_mask(window)
    return scaled_dot_product_attention(query_BGRD, keys_BGKD, values_BGKD, attn_mask=mask_B11K, scale=scale)
