"""Frozen linear layers that run on oneDNN, and so at a CPU's full width.

torch hands float32 products on x86 to MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN, in the same wheel,
makes its code for the CPU that it finds (docs/decisions/0009-products-on-onednn.md has the figures). Its operator has
no gradients of its own; here weights are frozen, so that only that of the input is needed, which is another product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_AVAILABLE = torch.backends.mkldnn.is_available()


class FrozenLinear(nn.Linear):
    """An ``nn.Linear`` whose weights do not learn: [..., in] -> [..., out]. On CPU in float32 it runs on oneDNN.

    A subclass of ``nn.Linear`` so that peft can put an adapter beside it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Output [..., out] of activations [..., in]."""
        if not self._on_onednn(input):
            return F.linear(input, self.weight, self.bias)
        result: Tensor = _Product.apply(input, self.weight, self.bias)
        return result

    def _on_onednn(self, input: Tensor) -> bool:
        own = [self.weight] if self.bias is None else [self.weight, self.bias]
        return _onednn_takes(input, *own) and not any(each.requires_grad for each in own)


class _Product(torch.autograd.Function):
    """Forward the product; backward the gradient of the input by the same weights."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _multiply(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(grad_outputs[0], ctx.weight.t(), None), None, None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    return product


def frozen_product(rows: Tensor, weight: Tensor) -> Tensor:
    """[N, in] and [out, in] to [N, out], on oneDNN where it can be; without gradients."""
    return _multiply(rows, weight, None) if _onednn_takes(rows, weight) else F.linear(rows, weight)


def _onednn_takes(*tensors: Tensor) -> bool:
    return _AVAILABLE and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)


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
