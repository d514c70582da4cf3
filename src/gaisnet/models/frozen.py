"""Frozen linear layers, multiplied by oneDNN (``gaisnet.onednn``)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gaisnet.onednn import product


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` with frozen weights: [..., in] -> [..., out].

    A subclass of ``nn.Linear`` so that peft can put an adapter beside it.
    """

    _columns: Tensor | None = None  # a second copy of the weight, column-major, during training

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., out] of activations [..., in]."""
        learning = torch.is_grad_enabled()  # answers keep their bits: products of a single row would differ
        return product(input, self.weight, self.bias, self._columns if learning else None)


@contextmanager
def quick_products(*modules: nn.Module) -> Iterator[None]:
    """Speed up training through the modules' frozen layers; inside the context their weights are held twice."""
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
    """Replace every ``nn.Linear`` inside ``module`` by its twin."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, twin(child))
        else:
            replace_linears(child, twin)


def freeze_linears(*modules: nn.Module) -> None:
    """Freeze every ``nn.Linear`` in the modules, themselves included; weights stay the same tensors."""
    for module in modules:
        for child in module.modules():
            if type(child) is nn.Linear:
                child.__class__ = FrozenLinear  # in place: tied weights stay tied, and hooks stay
                child.requires_grad_(False)
