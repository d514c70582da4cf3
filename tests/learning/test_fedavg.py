"""FedAvg against numbers computed by hand."""

import pytest
import torch

from gaisnet.errors import AdapterMismatch
from gaisnet.learning.fedavg import average_products, fedavg

pytestmark = pytest.mark.numeric


def test_weighted_by_examples() -> None:
    first = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}
    second = {"a": torch.tensor([5.0, 10.0]), "b": torch.tensor([[8.0]])}
    third = {"a": torch.tensor([0.0, -8.0]), "b": torch.tensor([[0.0]])}
    averaged = fedavg([(first, 2), (second, 1), (third, 1)])
    # a: (2*1 + 5 + 0) / 4 = 1.75, (2*2 + 10 - 8) / 4 = 1.5; b: (2*4 + 8 + 0) / 4 = 4
    torch.testing.assert_close(averaged["a"], torch.tensor([1.75, 1.5]))
    torch.testing.assert_close(averaged["b"], torch.tensor([[4.0]]))


def test_one_update_is_itself() -> None:
    update = {"a": torch.randn(3, 2)}
    assert torch.equal(fedavg([(update, 7)])["a"], update["a"])


def test_an_update_without_examples_counts_nothing() -> None:
    averaged = fedavg([({"a": torch.ones(2)}, 3), ({"a": torch.full((2,), 9.0)}, 0)])
    assert torch.equal(averaged["a"], torch.ones(2))


@pytest.mark.parametrize("updates", [[], [({"a": torch.ones(1)}, 0)]])
def test_nothing_to_average(updates: list[tuple[dict[str, torch.Tensor], int]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        fedavg(updates)


@pytest.mark.parametrize("odd", [{"b": torch.ones(2)}, {"a": torch.ones(3)}, {"a": torch.tensor([1.0, float("nan")])}])
def test_an_update_that_does_not_fit_is_refused(odd: dict[str, torch.Tensor]) -> None:
    with pytest.raises(AdapterMismatch):
        fedavg([({"a": torch.ones(2)}, 1), (odd, 1)])


# -- of products -------------------------------------------------------------------------------------------------------


def lora(rank: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x.lora_A.weight": (rank, 6), "x.lora_B.weight": (5, rank)}
    return {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}


def product(adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    return adapter["x.lora_B.weight"] @ adapter["x.lora_A.weight"]


def test_the_mean_of_products_is_exact_where_the_rank_allows_it_and_that_of_factors_is_not() -> None:
    first, second = lora(5, 1), lora(5, 2)
    expected = 0.75 * product(first) + 0.25 * product(second)
    torch.testing.assert_close(product(average_products([(first, 6), (second, 2)])), expected, atol=1e-5, rtol=1e-5)
    assert (product(fedavg([(first, 6), (second, 2)])) - expected).norm() > 0.3 * expected.norm()


def test_the_mean_of_products_is_as_near_as_the_rank_allows() -> None:
    updates = [(lora(2, seed), seed + 1) for seed in range(3)]
    expected = sum((product(a) * n / 6 for a, n in updates), torch.zeros(5, 6))
    found = average_products(updates)
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in updates[0][0].items()}
    missed = torch.linalg.svdvals(expected)[2:].square().sum().sqrt()
    assert (product(found) - expected).norm() == pytest.approx(float(missed), rel=1e-4)


def test_products_of_one_update_are_its_own() -> None:
    update = lora(2, 3)
    assert all(torch.equal(average_products([(update, 4)])[key], tensor) for key, tensor in update.items())


def test_what_is_no_factor_is_averaged_beside_products() -> None:
    first, second = (lora(2, seed) | {"classifier.bias": torch.tensor([float(seed), 0.0])} for seed in (1, 2))
    found = average_products([(first, 3), (second, 1)])
    plain = average_products([(lora(2, 1), 3), (lora(2, 2), 1)])
    assert found.keys() == first.keys() and torch.equal(found["classifier.bias"], torch.tensor([1.25, 0.0]))
    assert all(torch.equal(found[key], tensor) for key, tensor in plain.items())


def test_prompts_have_no_products_and_are_averaged_as_they_are() -> None:
    prompts = [({"layers.4.prompts.weight": torch.full((2, 3), float(i))}, n) for i, n in ((1, 3), (2, 1))]
    assert torch.equal(average_products(prompts)["layers.4.prompts.weight"], torch.full((2, 3), 1.25))


def test_products_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterMismatch):
        average_products([(lora(2, 1), 1), (lora(3, 1), 1)])
    with pytest.raises(ValueError, match="at least one"):
        average_products([])
