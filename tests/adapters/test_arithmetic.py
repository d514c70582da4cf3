"""Adapters become one by their weights: a sum is exact, TIES and DARE are what their papers say."""

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.arithmetic import Sparse, compressed, side_by_side, sparse_sum, weakened
from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter
from tests.adapters.bodies import SPEC, TARGETS, body_with, hidden, product

pytestmark = pytest.mark.numeric

# -- sums --------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    first = {"x.lora_A.weight": torch.tensor([[1.0, 2.0]]), "x.lora_B.weight": torch.tensor([[3.0], [0.0]])}
    second = {"x.lora_A.weight": torch.tensor([[0.0, -1.0]]), "x.lora_B.weight": torch.tensor([[1.0], [4.0]])}
    merged = side_by_side([first, second], weight=0.5)
    # B A: [[3, 6], [0, 0]] and [[0, -1], [0, -4]]; half of their sum is [[1.5, 2.5], [0, -2]]
    assert torch.equal(merged["x.lora_B.weight"] @ merged["x.lora_A.weight"], torch.tensor([[1.5, 2.5], [0.0, -2.0]]))


@pytest.mark.parametrize("weight", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_its_product_is_the_weighted_sum_of_all_products(names: tuple[str, ...], weight: float) -> None:
    body = body_with(*names)
    adapters = [take_out(body, name) for name in names]
    merged = side_by_side(adapters, weight)
    assert merged.keys() == adapters[0].keys()
    for module in {key.rsplit(".", 2)[0] for key in merged}:
        # The scale alpha / rank stays the same: both grow with the number of adapters.
        found = product(merged, module, SPEC.alpha * len(names), SPEC.rank * len(names))
        expected = sum((product(a, module, SPEC.alpha, SPEC.rank) for a in adapters), torch.tensor(0.0)) * weight
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_it_loads_as_an_adapter_of_higher_rank_that_acts_like_all_together() -> None:
    body = body_with("a", "b")
    add_adapter(body, "merged", LoraSpec(2 * SPEC.rank, 2 * SPEC.alpha, TARGETS, SPEC.layers), seed=9)
    put_in(body, "merged", side_by_side([take_out(body, "a"), take_out(body, "b")], weight=1.0))
    base = body(hidden())
    activate(body, ("a", "b"))
    expected = body(hidden())
    activate(body, ("merged",))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(body(hidden()), expected, atol=1e-5, rtol=1e-5)


def test_merging_new_adapters_merges_nothing() -> None:
    body = body_with("a")
    add_adapter(body, "new", SPEC, seed=3)
    merged = side_by_side([take_out(body, "new")] * 2, weight=1.0)
    assert not any(bool(t.any()) for key, t in merged.items() if ".lora_B." in key)


def test_merging_leaves_the_parts() -> None:
    adapters = [take_out(body_with("a"), "a") for _ in range(2)]
    before = [{key: tensor.clone() for key, tensor in adapter.items()} for adapter in adapters]
    for tensor in side_by_side(adapters, weight=0.5).values():
        tensor.zero_()
    assert all(torch.equal(a[key], b[key]) for a, b in zip(adapters, before, strict=True) for key in a)


def test_a_weakened_adapters_products_are_a_share() -> None:
    adapter = take_out(body_with("a"), "a")
    weak = weakened(adapter, 0.25)
    for module in {key.rsplit(".", 2)[0] for key in adapter}:
        assert torch.allclose(product(weak, module, 6, 2), 0.25 * product(adapter, module, 6, 2))


@pytest.mark.parametrize(("rank", "wanted"), [(2, 2), (4, 2), (7, 3), (3, 6)])  # below, above what a product can have
def test_compressed_is_the_best_of_its_rank(rank: int, wanted: int) -> None:
    (adapter,) = adapters_of(1, rank)
    found = compressed(adapter, wanted)
    assert found["x.lora_A.weight"].shape == (wanted, 6) and found["x.lora_B.weight"].shape == (5, wanted)
    u, s, v = torch.linalg.svd(product(adapter, "x", 1, 1))
    best = (u[:, :wanted] * s[:wanted]) @ v[: min(wanted, 5)]
    torch.testing.assert_close(product(found, "x", 1, 1), best, atol=1e-5, rtol=1e-5)


# -- sums with holes ---------------------------------------------------------------------------------------------------


def adapters_of(num: int, rank: int = 3) -> list[AdapterTensors]:
    """Of one module with 6 inputs and 5 outputs."""
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "x.lora_A.weight": torch.randn(rank, 6, generator=generator),
            "x.lora_B.weight": torch.randn(5, rank, generator=generator),
        }
        for _ in range(num)
    ]


def products(adapters: list[AdapterTensors]) -> list[Tensor]:
    return [product(each, "x", 1, 1).float() for each in adapters]


def test_ties_keeps_the_largest_and_follows_the_majority() -> None:
    """By hand, number by number: the largest half of each, those of the sign that weighs more, their mean."""
    adapters = adapters_of(3)
    found = sparse_sum(adapters, "ties", weight=0.8, density=0.5, seed=0)
    trimmed = [
        torch.where(p.abs() >= p.abs().flatten().sort().values[15], p, torch.zeros(())) for p in products(adapters)
    ]
    expected = torch.zeros(5, 6)
    for row in range(5):
        for column in range(6):
            numbers = [float(t[row, column]) for t in trimmed]
            sign = 1.0 if sum(numbers) >= 0 else -1.0
            agreeing = [number for number in numbers if number * sign > 0]
            expected[row, column] = 0.8 * sum(agreeing) / max(len(agreeing), 1)
    torch.testing.assert_close(product(found, "x", 1, 1).float(), expected, atol=1e-5, rtol=1e-5)


def test_dare_keeps_the_sum_on_average_and_is_the_same_for_a_seed() -> None:
    adapters = adapters_of(2)
    found = [sparse_sum(adapters, "dare", weight=0.5, density=0.5, seed=seed) for seed in range(300)]
    mean = torch.stack([product(each, "x", 1, 1) for each in found]).mean(dim=0).float()
    expected = sum(products(adapters), torch.zeros(5, 6)) * 0.5
    assert (mean - expected).abs().mean() < 0.1 * expected.abs().mean()
    again = sparse_sum(adapters, "dare", weight=0.5, density=0.5, seed=7)
    assert all(torch.equal(again[key], tensor) for key, tensor in found[7].items())
    assert not torch.equal(found[8]["x.lora_A.weight"], again["x.lora_A.weight"])


@pytest.mark.parametrize("method", ["ties", "dare"])
@pytest.mark.parametrize("rank", [1, 4])  # together below and above what a matrix of 5 rows can have
def test_they_have_the_shape_of_a_sum(method: Sparse, rank: int) -> None:
    adapters = adapters_of(2, rank)
    found = sparse_sum(adapters, method, 1.0, 0.5, 0)
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in side_by_side(adapters).items()}


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_random_numbers_elsewhere_are_not_touched(method: Sparse) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sparse_sum(adapters_of(2), method, 1.0, 0.5, 0)
    assert torch.equal(torch.rand(3), expected)
