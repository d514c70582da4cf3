"""Closed forms are the best there is, and what is traced is what a layer's modules see."""

import threading

import pytest
import torch
from torch import Tensor, nn

from gaisnet.adapters.tuning import activate
from gaisnet.learning.regression import fit_low_rank, second_moments, solve_ridge, trace_layer
from gaisnet.models.ragged import Ragged
from tests.adapters.bodies import TARGETS, body_with

pytestmark = pytest.mark.numeric


def rows(num: int, width: int, seed: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def objective(x: Tensor, y: Tensor, weights_ID: Tensor, ridge: float) -> float:
    return float((y - x @ weights_ID).square().sum() + ridge * weights_ID.square().sum())


@pytest.mark.parametrize("num", [9, 40])  # fewer and more rows than inputs
def test_full_rank_is_ridge_regression(num: int) -> None:
    x, y = rows(num, 12, 0), rows(num, 5, 1)
    a, b = fit_low_rank(x, y, rank=5, penalty=0.5)
    ridge = 0.5 * float(x.square().mean(dim=0).mean()) * num
    expected = torch.linalg.inv(x.double().T @ x.double() + ridge * torch.eye(12)) @ x.double().T @ y.double()
    assert torch.allclose((b @ a).T.double(), expected, atol=1e-5)


@pytest.mark.parametrize("num", [9, 40])
def test_no_weights_of_the_rank_are_better(num: int) -> None:
    """Steps of an optimizer, from what was found and from elsewhere, find nothing that is."""
    x, y, rank, penalty = rows(num, 12, 2), rows(num, 6, 3), 2, 0.3
    a, b = fit_low_rank(x, y, rank, penalty)
    ridge = penalty * float(x.square().sum()) / 12
    found = objective(x, y, (b @ a).T, ridge)
    for start_a, start_b in [(a, b), (rows(rank, 12, 4), rows(6, rank, 5))]:
        factors = [start_a.double().requires_grad_(), start_b.double().requires_grad_()]  # float32 stops too early
        optimizer = torch.optim.LBFGS(factors, max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss(factors: list[Tensor] = factors, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            weights = (factors[1] @ factors[0]).T
            value = (y.double() - x.double() @ weights).square().sum() + ridge * weights.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        best = objective(x, y, (factors[1] @ factors[0]).T.detach().float(), ridge)
        assert found <= best * (1 + 1e-4)
        assert best == pytest.approx(found, rel=1e-3)


def test_a_rank_above_the_width_adds_nothing() -> None:
    x, y = rows(30, 8, 6), rows(30, 4, 7)
    a, b = fit_low_rank(x, y, rank=6, penalty=0.1)
    assert a.shape == (6, 8) and b.shape == (4, 6)
    fitting = fit_low_rank(x, y, rank=4, penalty=0.1)
    assert torch.allclose(b @ a, fitting[1] @ fitting[0], atol=1e-6)


def test_a_system_that_cholesky_cannot_solve_is_solved() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -2.0, 3.0]))
    assert torch.allclose(solve_ridge(indefinite, 0.0, torch.eye(3)), torch.diag(torch.tensor([1.0, -0.5, 1 / 3])))


def test_moments_are_the_mean_outer_product() -> None:
    x = rows(7, 4, 8)
    assert torch.allclose(second_moments(x), torch.stack([torch.outer(r, r) for r in x]).mean(dim=0), atol=1e-6)
    assert not second_moments(x[:0]).any()  # of no rows


@pytest.mark.parametrize("acts", [True, False])
def test_traced_is_what_the_modules_of_a_layer_see_sequence_by_sequence(acts: bool) -> None:
    body = body_with("a")
    activate(body, ("a",) if acts else ())
    lengths = (5, 2, 9)
    states = Ragged(rows(sum(lengths), 32, 9), lengths)
    inputs, leaving = trace_layer(body, "a", 4, states)
    assert [path.rsplit(".", 1)[-1] for path in inputs] == list(TARGETS)
    seen: dict[str, list[Tensor]] = {path: [] for path in inputs}

    def keep(path: str) -> None:
        module: nn.Module = body.layers["4"].get_submodule(path)
        module.register_forward_pre_hook(lambda _, entering: seen[path].append(entering[0][0]))

    for path in inputs:
        keep(path)
    found = [body.run(sequence[None], 4, 5)[0] for sequence in states.sequences()]
    torch.testing.assert_close(leaving.rows_ND, torch.cat(found), atol=1e-5, rtol=1e-5)
    for path, rows_seen in seen.items():
        torch.testing.assert_close(inputs[path].rows_ND, torch.cat(rows_seen), atol=1e-5, rtol=1e-5)
    assert all(each.lengths == lengths for each in (leaving, *inputs.values()))


def test_what_another_thread_makes_enter_is_not_traced() -> None:
    """A service that runs the same layers meanwhile sees its own rows only."""
    body = body_with("a")
    activate(body, ())
    states, lengths = rows(12, 32, 1), (5, 7)
    expected, _ = trace_layer(body, "a", 4, Ragged(states, lengths))
    served: list[int] = []

    def serve(*_: object) -> None:
        if not served:
            served.append(1)
            thread = threading.Thread(target=lambda: body.run(rows(3, 32, 2)[None], 4, 5))
            thread.start()
            thread.join()

    body.layers["4"].get_submodule("self_attn.o_proj").register_forward_pre_hook(serve)
    found, _ = trace_layer(body, "a", 4, Ragged(states, lengths))
    assert served
    assert all(torch.equal(found[path].rows_ND, expected[path].rows_ND) for path in expected)
