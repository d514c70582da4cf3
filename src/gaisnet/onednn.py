"""Products with frozen weights, and with LoRA factors, on oneDNN, at a CPU's full vector width.

torch hands float32 products on x86 to MKL, which uses only AVX2 on CPUs that are not Intel's. oneDNN, in the same
wheel, compiles for the CPU that it finds (docs/decisions/0009-products-on-onednn.md has the figures). Its operator has
no gradients; each is another product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_AVAILABLE = torch.backends.mkldnn.is_available()


def product(input: Tensor, weight: Tensor, bias: Tensor | None = None, for_output: Tensor | None = None) -> Tensor:
    """Multiply ``input`` [..., in] by ``weight`` [out, in], plus ``bias`` [out]: [..., out]; on a CPU by oneDNN.

    Gradients go to the input; trained weights use torch's own product. ``for_output``: the same weight in column-major
    order, which oneDNN need not reorder for the output. Gradients need the other one.
    """
    own = [weight] if bias is None else [weight, bias]
    if not _onednn_takes(input, *own) or any(each.requires_grad for each in own):
        return F.linear(input, weight, bias)
    result: Tensor = _Product.apply(input, weight, bias, weight if for_output is None else for_output)
    return result


def add_low_rank(result: Tensor, input: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Add LoRA's ``scale`` times ``b`` [out, R] ``a`` [R, in] ``input`` [..., in] to ``result`` [..., out].

    Gradients go to all four. The scale is applied on the narrow side; in float32 on a CPU the sum is part of the
    product.
    """
    if not _onednn_takes(result, input, a, b):
        narrow = F.linear(input.to(a.dtype), a) * scale
        return result + F.linear(narrow, b).to(result.dtype)
    added: Tensor = _LowRank.apply(result, input, a, b, scale)
    return added


class _Product(torch.autograd.Function):
    """Forward: the product. Backward: the gradient of the input by the same weights."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, for_output: Tensor) -> Tensor:
        ctx.weight = weight
        return _multiply(input, for_output, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        return _multiply(grad_outputs[0], ctx.weight.t()), None, None, None


class _LowRank(torch.autograd.Function):
    """Forward: two products, the second added to the result. Backward: two for the input and one for each factor."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, input: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        narrow = _multiply(input, a).mul_(scale)
        ctx.save_for_backward(input, narrow, a, b)
        ctx.scale = scale
        added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(narrow, result.contiguous(), b, None, "add")
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, None]:
        (grad,), (input, narrow, a, b) = grad_outputs, ctx.saved_tensors
        of_narrow = _multiply(grad, b.t()).mul_(ctx.scale)
        of_input = _multiply(of_narrow, a.t()) if ctx.needs_input_grad[1] else None
        return grad, of_input, _summed(of_narrow, input), _summed(grad, narrow), None


def _summed(left: Tensor, right: Tensor) -> Tensor:
    """Sum the outer products of all rows: [..., out] and [..., in] give [out, in]."""
    if not right.numel():  # oneDNN needs at least one row
        return left.new_zeros(left.shape[-1], right.shape[-1])
    rows, columns = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if rows.shape[1] > columns.shape[1]:  # the first factor is copied to be transposed: let it be the narrow one
        return _multiply(columns.t(), rows.t()).t()
    return _multiply(rows.t(), columns.t())


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows.contiguous(), weight, bias, "none", [], "")
    return result


def _onednn_takes(*tensors: Tensor) -> bool:
    return _AVAILABLE and all(each.device.type == "cpu" and each.dtype == torch.float32 for each in tensors)
