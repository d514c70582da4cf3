"""Weight-only quantization: frozen matrices that a device holds in int8 or int4, and layers on them.

Shape legend: N rows of activations, R rows of a matrix, D its width.

Weights are quantized as in ``gaisnet.row_quant``; activations are not. An embedding widens the rows that it looks up. A
linear layer widens a block of rows at a time, into the same memory, and multiplies by it as by any frozen weight. So a
matrix takes a quarter or an eighth of its bytes, and a product about its time in float32
(docs/decisions/0011-frozen-parts-in-few-bits.md has the figures). A tied embedding and vocabulary head share one
matrix.
"""

from collections.abc import Iterator
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gaisnet.models.frozen import replace_linears
from gaisnet.onednn import product
from gaisnet.row_quant import GROUP, from_int4, from_int8, num_bytes, num_groups, to_int4, to_int8

FewBits = Literal["int8", "int4"]

_BLOCK_NUMBERS = 2**21  # numbers widened at once: 8 MiB, which stay in a CPU's cache until they are multiplied


class RoundedMatrix(nn.Module):
    """A quantized matrix [R, D], empty until a state is loaded.

    Attributes:
        num_rows: R.
        width: D.
    """

    codes: Tensor  # int8 [R, D], or uint8 [R, D / 2]
    scale: Tensor  # float32 [R, 1]
    shares: Tensor | None  # scales of groups, uint8 [R, D / GROUP]; int4 only

    def __init__(self, precision: FewBits, num_rows: int, width: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.width = width
        code, num = (torch.int8, width) if precision == "int8" else (torch.uint8, num_bytes(width))
        shares = torch.empty(num_rows, num_groups(width), dtype=torch.uint8) if precision == "int4" else None
        self.register_buffer("codes", torch.empty(num_rows, num, dtype=code))
        self.register_buffer("shares", shares)
        self.register_buffer("scale", torch.empty(num_rows, 1))

    @classmethod
    def quantize(cls, weight: Tensor, precision: FewBits) -> Self:
        """Quantize ``weight`` [R, D] of any floating dtype."""
        matrix = cls(precision, *weight.shape)
        if precision == "int8":
            matrix.codes, matrix.scale = to_int8(weight.detach())
        else:
            matrix.codes, matrix.shares, matrix.scale = to_int4(weight.detach())
        return matrix

    def rows(self, which: Tensor | slice) -> Tensor:
        """Return some rows, widened: float32 [..., D]."""
        if self.shares is None:
            return from_int8(self.codes[which], self.scale[which])
        return from_int4(self.codes[which], self.shares[which], self.scale[which], self.width)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield all rows in blocks: their slice, and float32 [some, D], which the next block overwrites.

        The caller multiplies by ``scale``: on a product's narrow side there are fewer numbers to multiply.
        """
        size = max(1, min(self.num_rows, _BLOCK_NUMBERS // self.width))
        filled = self.width if self.shares is None else num_groups(self.width) * GROUP
        memory = torch.empty(size, filled, device=self.codes.device)
        for first in range(0, self.num_rows, size):
            which = slice(first, min(first + size, self.num_rows))
            yield which, self._unscaled(which, memory[: which.stop - first])

    def _unscaled(self, which: slice, out: Tensor) -> Tensor:
        if self.shares is None:
            return out.copy_(self.codes[which])
        return from_int4(self.codes[which], self.shares[which], torch.ones_like(self.scale[which]), self.width, out)


class RoundedEmbedding(nn.Module):
    """Maps token ids [...] to rows [..., D] of a matrix, in ``dtype``."""

    def __init__(self, matrix: RoundedMatrix, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = matrix
        self.num_embeddings = matrix.num_rows
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Return rows [..., D] of int64 ids [...]."""
        return self.weight.rows(ids).to(self._dtype)


class RoundedLinear(nn.Module):
    """Maps [..., D] to [..., R] by a frozen matrix.

    It passes gradients through to its input but has none of its own.
    """

    bias: Tensor | None  # [R]

    def __init__(self, matrix: RoundedMatrix, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = matrix
        self.register_buffer("bias", bias)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output [..., R] of activations [..., D], in their dtype."""
        result: Tensor = _Product.apply(input, self.weight)
        return result if self.bias is None else result + self.bias


class _Product(torch.autograd.Function):
    """Forward: the product. Backward: the gradient of the input by the same weights. At least in float32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, matrix: RoundedMatrix) -> Tensor:
        ctx.matrix = matrix
        rows_ND = _wide(input).reshape(-1, matrix.width)
        product_NR = rows_ND.new_empty(len(rows_ND), matrix.num_rows)
        for which, block_RD in matrix.blocks():
            product_NR[:, which] = product(rows_ND, block_RD.to(rows_ND.dtype))
        product_NR *= matrix.scale.t()
        return product_NR.view(*input.shape[:-1], matrix.num_rows).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,), matrix = grad_outputs, ctx.matrix
        grad_NR = _wide(grad).reshape(-1, matrix.num_rows) * matrix.scale.t()
        sum_ND = grad_NR.new_zeros(len(grad_NR), matrix.width)
        for which, block_RD in matrix.blocks():
            sum_ND += product(grad_NR[:, which], block_RD.to(grad_NR.dtype).t())
        return sum_ND.view(*grad.shape[:-1], matrix.width).to(grad.dtype), None


def _wide(tensor: Tensor) -> Tensor:
    """Widen to at least float32: sums of codes are large before they are scaled."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def to_empty_few_bits(module: nn.Module, precision: FewBits) -> None:
    """Replace every ``nn.Linear`` inside ``module`` by an empty twin, in place, to load tensors into."""
    replace_linears(module, lambda wide: empty_linear(wide, precision))


def empty_linear(linear: nn.Linear, precision: FewBits) -> RoundedLinear:
    """Return an empty twin of a linear layer, without memory."""
    bias = None if linear.bias is None else linear.bias.detach()
    return RoundedLinear(empty_matrix(precision, linear.out_features, linear.in_features), bias)


def empty_matrix(precision: FewBits, num_rows: int, width: int) -> RoundedMatrix:
    """Return an empty matrix without memory (meta device)."""
    with torch.device("meta"):
        return RoundedMatrix(precision, num_rows, width)
