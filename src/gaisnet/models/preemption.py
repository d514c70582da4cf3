"""Preemption points inside forward and backward passes, between the parts of layers."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def pause_within(layers: Iterable[nn.Module], pause: Callable[[], None]) -> None:
    """Call ``pause`` after each part of each layer, such as a projection, and before it on the way back.

    Results do not change. It applies to every caller of the layers, and to copies of them. Backward passes on a GPU run
    in a thread of torch's own; ``pause`` must allow that.

    Args:
        layers: Transformer layers; their parts are two levels down.
        pause: Called often; must be quick when there is nothing to do.
    """

    def after(module: nn.Module, args: Any, output: Any) -> None:
        pause()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda _: pause())

    for layer in layers:
        for block in layer.children():
            for part in block.children():
                part.register_forward_hook(after)
