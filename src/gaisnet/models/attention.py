"""Attention of transformers' layers, which a call may replace through the interface that transformers has for it.

The layers' own code runs, and nothing of it is copied. Without a replacement they use what transformers calls 'sdpa'.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_NAME = "gaisnet"

Attend = Callable[..., tuple[Tensor, Tensor | None]]
"""Takes what transformers gives an attention: the module, query [B, H, T, D], key and value [B, G, T, D], a mask, its
settings by name. Gives back [B, T, H, D], and weights or None."""


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


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    attend: Attend = sdpa_attention_forward,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return attend(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(_NAME, _attend)
