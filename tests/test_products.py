"""Products with weights that learn: outputs and all gradients are those of torch's own."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.products import product


def some(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 7, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...], of_input: bool, bias: bool) -> None:
    found: list[list[Tensor | None]] = []
    for function in (F.linear, product):
        input, weight = some(*shape, seed=0).requires_grad_(of_input), some(40, 24, seed=1).requires_grad_()
        output = function(input, weight, some(40, seed=2) if bias else None)
        output.square().sum().backward()
        found.append([output.detach(), input.grad, weight.grad])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_go_the_way_of_torch(dtype: torch.dtype) -> None:
    input, weight = some(3, 24, seed=0).to(dtype), some(40, 24, seed=1).to(dtype)
    assert torch.equal(product(input, weight), F.linear(input, weight))


def test_half_of_the_gradients_need_not_be_in_a_row() -> None:
    input, weight = some(24, 6, seed=0).t(), some(40, 24, seed=1).requires_grad_()
    product(input, weight).sum().backward()  # a sum's gradient is one number, expanded
    torch.testing.assert_close(weight.grad, input.sum(dim=0).expand(40, -1), rtol=1e-5, atol=1e-4)
