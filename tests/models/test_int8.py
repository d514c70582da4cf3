"""int8 layers: their error, their gradient, their independence of the batch, their way through a release."""

import copy

import pytest
import torch
from torch import nn

from gaisnet.models.int8 import Int8Linear, input_peaks, to_empty_int8, to_int8

pytestmark = pytest.mark.numeric


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(64, 48, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_error_is_that_of_rounding(bias: bool) -> None:
    exact = linear(bias)
    rows = torch.randn(10, 3, 64)
    found = Int8Linear.from_linear(exact)(rows)
    assert ((found - exact(rows)).norm() / exact(rows).norm()).item() < 0.02


def test_weights_are_within_half_a_step() -> None:
    exact = linear()
    rounded = Int8Linear.from_linear(exact)
    assert bool(
        ((rounded.widened(torch.float32) - exact.weight).abs() <= rounded.weight_scale[:, None] / 2 + 1e-7).all()
    )


def test_it_does_not_matter_how_weights_lie_in_memory() -> None:
    rows, columns = linear(), linear()
    columns.weight.data = columns.weight.data.t().contiguous().t()
    input = torch.randn(10, 64)
    assert torch.equal(Int8Linear.from_linear(columns)(input), Int8Linear.from_linear(rows)(input))


def test_no_sum_overflows_at_the_largest_numbers() -> None:
    exact = nn.Linear(512, 16, bias=False)
    nn.init.constant_(exact.weight, 1.0)
    rows = torch.ones(4, 512)
    torch.testing.assert_close(Int8Linear.from_linear(exact)(rows), exact(rows), rtol=1e-3, atol=0.0)


def test_a_row_does_not_depend_on_its_batch() -> None:
    layer = Int8Linear.from_linear(linear())
    rows = torch.randn(9, 64)
    rows[0] *= 1000
    assert torch.equal(layer(rows)[3:5], layer(rows[3:5]))


def test_a_row_of_zeros_gives_the_bias() -> None:
    layer = Int8Linear.from_linear(linear())
    torch.testing.assert_close(layer(torch.zeros(2, 64)), layer.bias.expand(2, -1))


@torch.no_grad()
def test_smoothing_helps_where_one_input_channel_is_large() -> None:
    exact = linear(bias=False)
    rows = torch.randn(200, 64)
    rows[:, 5] *= 100
    peaks = input_peaks(nn.ModuleDict({"it": exact}), lambda: exact(rows))

    def error(layer: Int8Linear) -> float:
        return float((layer(rows) - exact(rows)).norm())

    assert set(peaks) == {"it"}
    assert error(Int8Linear.from_linear(exact, peaks["it"])) < 0.5 * error(Int8Linear.from_linear(exact))


def test_gradient_of_the_input_is_that_of_the_widened_weights() -> None:
    layer = Int8Linear.from_linear(linear())
    rows = torch.randn(5, 64, requires_grad=True)
    grad = torch.randn(5, 48)
    layer(rows).backward(grad)
    torch.testing.assert_close(rows.grad, grad @ layer.widened(torch.float32))


def test_other_dtypes_widen_the_weights() -> None:
    exact = linear()
    layer = Int8Linear.from_linear(exact).to(torch.float64)
    rows = torch.randn(5, 64, dtype=torch.float64)
    assert layer.weight.dtype == torch.int8
    torch.testing.assert_close(layer(rows), exact.double()(rows), rtol=0.02, atol=0.02)


def test_state_goes_into_an_empty_twin_and_a_deep_copy() -> None:
    filled = nn.Sequential(linear())
    to_int8(filled, {})
    empty = nn.Sequential(linear())
    to_empty_int8(empty)
    rows = torch.randn(5, 64)
    expected = filled(rows)
    assert not torch.equal(empty(rows), expected)
    empty.load_state_dict(filled.state_dict())
    assert torch.equal(empty(rows), expected)
    assert torch.equal(copy.deepcopy(filled)(rows), expected)
