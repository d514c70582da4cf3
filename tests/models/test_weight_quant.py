"""Matrices in few bits: what they cost, what they give, and that only a part of them is ever widened."""

import pytest
import torch
from torch import Tensor, nn

from gaisnet.models import weight_quant as few_bits
from gaisnet.models.weight_quant import (
    FewBits,
    RoundedEmbedding,
    RoundedLinear,
    RoundedMatrix,
    empty_linear,
    to_empty_few_bits,
)

pytestmark = pytest.mark.numeric

ROWS, WIDTH = 50, 72  # not a whole number of int4's groups
BOTH = pytest.mark.parametrize("precision", ["int8", "int4"])


def weight(num_rows: int = ROWS, width: int = WIDTH) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1))


def whole(matrix: RoundedMatrix) -> Tensor:
    """All of it, widened."""
    return matrix.rows(slice(None))


@pytest.mark.parametrize(("precision", "most"), [("int8", 1 / 254), ("int4", (1 + 1 / 255) / 14)])
def test_numbers_are_within_the_bound_of_rounding(precision: FewBits, most: float) -> None:
    exact = weight()
    error = (whole(RoundedMatrix.quantize(exact, precision)) - exact).abs()
    assert bool((error <= most * exact.abs().amax(dim=1, keepdim=True) + 1e-6).all())
    assert float(error.max()) > 0


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.255), ("int4", 0.135)])
def test_a_matrix_takes_a_quarter_or_an_eighth_of_float32(precision: FewBits, share: float) -> None:
    exact = weight(200, 576)
    assert sum(t.nbytes for t in RoundedMatrix.quantize(exact, precision).buffers()) < share * exact.nbytes


@BOTH
@pytest.mark.parametrize("block", [1, 7 * WIDTH, 10**6])
def test_blocks_are_the_rows_in_order(monkeypatch: pytest.MonkeyPatch, precision: FewBits, block: int) -> None:
    monkeypatch.setattr(few_bits, "_BLOCK_NUMBERS", block)
    matrix = RoundedMatrix.quantize(weight(), precision)
    found = [(which, rows.clone()) for which, rows in matrix.blocks()]
    torch.testing.assert_close(torch.cat([rows for _, rows in found]) * matrix.scale, whole(matrix))
    assert [i for which, _ in found for i in range(which.start, which.stop)] == list(range(ROWS))
    assert max(len(rows) for _, rows in found) == max(1, min(ROWS, block // WIDTH))


@BOTH
@pytest.mark.parametrize("block", [7 * WIDTH, 10**6])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradient_are_those_of_the_widened_matrix(
    monkeypatch: pytest.MonkeyPatch, precision: FewBits, block: int, bias: bool
) -> None:
    monkeypatch.setattr(few_bits, "_BLOCK_NUMBERS", block)
    added = torch.randn(ROWS) if bias else None
    layer = RoundedLinear(RoundedMatrix.quantize(weight(), precision), added)
    rows, grad = torch.randn(2, 5, WIDTH, requires_grad=True), torch.randn(2, 5, ROWS)
    found = layer(rows)
    found.backward(grad)
    torch.testing.assert_close(found, nn.functional.linear(rows, whole(layer.weight), added), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.grad, grad @ whole(layer.weight), atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_what_they_are(precision: FewBits, dtype: torch.dtype) -> None:
    matrix = RoundedMatrix.quantize(weight().to(dtype), precision)
    rows = torch.randn(3, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(3))
    found = RoundedLinear(matrix)(rows)
    assert found.dtype == dtype
    exact = rows.double() @ whole(matrix).double().t()  # the product is in float32 at least, and rounded once
    bound = 1e-6 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=bound, atol=1e-6)
    assert RoundedEmbedding(matrix, dtype)(torch.tensor([1])).dtype == dtype


@BOTH
def test_an_embedding_looks_rows_up(precision: FewBits) -> None:
    matrix = RoundedMatrix.quantize(weight(), precision)
    ids = torch.tensor([[3, 0, 49], [3, 3, 1]])
    embedding = RoundedEmbedding(matrix, torch.float32)
    assert torch.equal(embedding(ids), whole(matrix)[ids])
    assert embedding.num_embeddings == ROWS


@BOTH
def test_a_state_goes_into_an_empty_twin_without_a_copy(precision: FewBits) -> None:
    linear = nn.Linear(WIDTH, ROWS)
    full, empty = RoundedLinear(RoundedMatrix.quantize(linear.weight, precision), linear.bias), nn.Sequential(linear)
    to_empty_few_bits(empty, precision)
    assert all(t.is_meta for t in empty_linear(linear, precision).weight.buffers())
    state = full.state_dict()
    empty.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=True)
    assert torch.equal(empty(torch.ones(1, WIDTH)), full(torch.ones(1, WIDTH)))
    assert {t.data_ptr() for t in empty.buffers()} == {t.data_ptr() for t in state.values()}
