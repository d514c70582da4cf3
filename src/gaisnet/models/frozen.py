"""Frozen linear layers: their products run on oneDNN, see ``gaisnet.onednn``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gaisnet.onednn import product


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` whose weights do not learn: [..., in] -> [..., out].

    A subclass of ``nn.Linear`` so that peft can put an adapter beside it.
    """

    _columns: Tensor | None = None  # the weight once more, column after column, while something learns

    def forward(self, input: Tensor) -> Tensor:
        """Output [..., out] of activations [..., in]."""
        learning = torch.is_grad_enabled()  # answers keep their bits: those of a single row differ
        return product(input, self.weight, self.bias, self._columns if learning else None)


@contextmanager
def quick_products(*modules: nn.Module) -> Iterator[None]:
    """Inside, what learns through the modules' frozen layers is quicker, for a second copy of their weights."""
    children = (child for module in modules for child in module.modules())
    layers = [each for each in children if isinstance(each, FrozenLinear) and not each.weight.requires_grad]
    try:
        for layer in layers:
            layer._columns = layer.weight.detach().t().contiguous().t()
        yield
    finally:
        for layer in layers:
            layer._columns = None


def replace_linears(module: nn.Module, twin: Callable[[nn.Linear], nn.Module]) -> None:
    """Put the twin of every ``nn.Linear`` inside ``module`` in its place."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, twin(child))
        else:
            replace_linears(child, twin)


def freeze_linears(*modules: nn.Module) -> None:
    """Let every ``nn.Linear`` in the modules, or that is one of them, be frozen; its weight stays the same tensor."""
    for module in modules:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = FrozenLinear  # in place: tied weights stay tied, and hooks where they are
                child.requires_grad_(False)
