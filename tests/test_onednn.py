"""Products on oneDNN: outputs and all gradients are those of torch's own. Frozen ones: ``models/test_frozen.py``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gaisnet.onednn import add_low_rank

pytestmark = pytest.mark.numeric

LowRank = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def as_it_reads(result: Tensor, input: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return result + scale * (input @ a.T) @ b.T


def learned(function: LowRank, shape: tuple[int, ...], dtype: torch.dtype, of_input: bool) -> list[Tensor | None]:
    """The output, and the gradients of the result, the input and both factors."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape[:-1], 40), shape, (8, 24), (40, 8)]
    leaves = [torch.randn(each, generator=generator).to(dtype) for each in shapes]
    for leaf, learns in zip(leaves, (True, of_input, True, True), strict=True):
        leaf.requires_grad_(learns)
    result, input, a, b = leaves
    output = function(result, input, a, b, 2.0)
    output.square().sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 7, 24), (0, 24)], ids=str)
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_torch(shape: tuple[int, ...], of_input: bool, dtype: torch.dtype) -> None:
    found, expected = (learned(each, shape, dtype, of_input) for each in (add_low_rank, as_it_reads))
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-3)


def test_nothing_need_lie_in_a_row() -> None:
    result, input = torch.randn(40, 6).t(), torch.randn(24, 6).t()
    a, b = torch.randn(8, 24).requires_grad_(), torch.randn(40, 8).requires_grad_()
    output = add_low_rank(result, input, a, b, 2.0)
    torch.testing.assert_close(output, as_it_reads(result, input, a, b, 2.0), rtol=1e-4, atol=1e-4)
    output.sum().backward()  # a sum's gradient is one number, expanded
    torch.testing.assert_close(b.grad, (2.0 * (input @ a.T)).sum(dim=0).expand(40, -1), rtol=1e-4, atol=1e-4)


def test_factors_in_float32_beside_weights_in_half() -> None:
    result, input = torch.randn(3, 40).bfloat16(), torch.randn(3, 24).bfloat16()
    a, b = torch.randn(8, 24), torch.randn(40, 8)
    found = add_low_rank(result, input, a, b, 2.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(
        found.float(), as_it_reads(result.float(), input.float(), a, b, 2.0), rtol=0.02, atol=0.2
    )
