"""Attention of transformers' layers, which a call may replace through the interface that transformers has for it.

The layers' own code runs, and nothing of it is copied. Without a replacement they use what transformers calls 'sdpa'.

Shape legend: B sequences, T positions, H attention heads, G of them with keys and values of their own, S size of a
head, D hidden size, P rows that are shown besides.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "gaisnet"

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""Takes what transformers gives an attention: the module, query [B, H, T, S], key and value [B, G, T, S], a mask, its
settings by name. Gives back [B, T, H, S], and weights or None."""

Rows = Callable[[], Tensor | None]
"""Gives rows [P, D], or none."""


def let_attention_be_replaced(layers: nn.ModuleDict) -> None:
    """From now on these layers (``Layers.layers``) take a replacement, ``attend``, wherever they are called.

    Masks are made as before.

    Their attention gets a configuration of its own that names ours, so it is 'sdpa' also where a model was loaded with
    another.
    """
    for module in layers.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and config._attn_implementation != _NAME:
            own = copy.copy(config)
            own._attn_implementation = _NAME
            module.config = own  # type: ignore[assignment]


def let_see(attention: nn.Module, rows: Rows, keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """From now on every position that this attention looks from sees these rows, too, at every call.

    Args:
        attention: Not a causal one; ``let_attention_be_replaced`` must have seen its layer.
        rows: Asked at every call.
        keys_and_values: What the attention makes of rows [P, D] in its own dtype: each [P, G * S].
    """

    def show(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        shown_PD = rows()
        if shown_PD is None:
            return None
        return args, {**kwargs, "shown": keys_and_values(shown_PD.to(args[0].dtype))}

    attention.register_forward_pre_hook(show, with_kwargs=True)


def attend_to_all(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *args: Any,
    shown: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """'sdpa' over the sequences, and over keys and values [P, G * S] that are ``shown`` to all of them."""
    if shown is not None:
        key, value = (_before(rows, own) for rows, own in zip(shown, (key, value), strict=True))
        mask = mask if mask is None else F.pad(mask, (len(shown[0]), 0), value=True)
    return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)


def _before(rows: Tensor, own_BGTS: Tensor) -> Tensor:
    """Rows [P, G * S] and a sequence's own: [B, G, P + T, S]."""
    num, heads, _, size = own_BGTS.shape
    rows_GPS = rows.view(-1, heads, size).transpose(0, 1)
    return torch.cat([rows_GPS.expand(num, -1, -1, -1), own_BGTS], dim=2)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    attend: Attend = attend_to_all,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(_NAME, _attend)
