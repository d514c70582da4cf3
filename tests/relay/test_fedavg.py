"""FedAvg against numbers computed by hand."""

import pytest
import torch

from gaisnet.errors import AdapterMismatch
from gaisnet.relay.fedavg import fedavg


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
