"""Replaceable attention for transformers' layers, through transformers' own attention interface.

The layers' code runs unchanged and is not copied. Without a replacement they use 'sdpa'.

Shape legend: B sequences, T positions, H attention heads, G heads of keys and values, S size of a head, D hidden size,
P extra rows.
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
"""An attention: takes what transformers passes (the module, query [B, H, T, S], key and value [B, G, T, S], a mask,
settings by name) and returns [B, T, H, S], and weights or None."""

Rows = Callable[[], Tensor | None]
"""Returns extra rows [P, D], or none."""


def let_attention_be_replaced(layers: nn.ModuleDict) -> None:
    """Let these layers (``Layers.layers``) accept a replacement, the argument ``attend`` of every call.

    Masks are made as before. The layers' attention gets its own copy of the configuration, so it is 'sdpa' even if the
    model was loaded with another one.
    """
    for module in layers.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and config._attn_implementation != _NAME:
            own = copy.copy(config)
            own._attn_implementation = _NAME
            module.config = own  # type: ignore[assignment]


def let_see(attention: nn.Module, rows: Rows, keys_and_values: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """Let every position of this attention also attend to extra rows, at every call.

    Args:
        attention: Not causal; its layer must have passed ``let_attention_be_replaced``.
        rows: Called for the rows at every call.
        keys_and_values: Maps rows [P, D] to keys and values, each [P, G * S], in the attention's dtype.
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
    """Run 'sdpa' over the sequences with extra keys and values [P, G * S] before every one."""
    if shown is not None:
        key, value = (_before(rows, own) for rows, own in zip(shown, (key, value), strict=True))
        mask = mask if mask is None else F.pad(mask, (len(shown[0]), 0), value=True)
    return sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)


def _before(rows: Tensor, own_BGTS: Tensor) -> Tensor:
    """Put rows [P, G * S] before a sequence's own: [B, G, P + T, S]."""
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
