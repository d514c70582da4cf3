"""Products with weights on oneDNN, and so at a CPU's full width.

torch hands float32 products on x86 to MKL, which keeps to AVX2 on CPUs that are not Intel's. oneDNN, in the same wheel,
makes its code for the CPU that it finds (docs/decisions/0009-products-on-onednn.md has the figures). Its operator has
no gradients of its own: each is another product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_AVAILABLE = torch.backends.mkldnn.is_available()


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input`` [..., in] times ``weight`` [out, in], plus ``bias`` [out]: [..., out]; on oneDNN on a CPU in float32.

    Gradients go to the input, and to a weight that learns; a bias that learns takes torch's own way.
    """
    own = [input, weight] if bias is None else [input, weight, bias]
    if not _onednn_takes(*own) or (bias is not None and bias.requires_grad):
        return F.linear(input, weight, bias)
    result: Tensor = _Product.apply(input, weight, bias)
    return result


class _Product(torch.autograd.Function):
    """Forward the product; backward one product for each gradient that is needed."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input if weight.requires_grad else None, weight)
        return _multiply(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (input, weight) = grad_outputs, ctx.saved_tensors
        of_input = _multiply(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_input, None, None
        if not input.numel():  # oneDNN sums over one row at least
            return of_input, torch.zeros_like(weight), None
        rows, inputs = grad.reshape(-1, grad.shape[-1]), input.reshape(-1, input.shape[-1])
        return of_input, _multiply(rows.t(), inputs.t(), None), None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    return result


def _onednn_takes(*tensors: Tensor) -> bool:
    return _AVAILABLE and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)
