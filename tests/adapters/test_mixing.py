"""Rows of one batch with different adapters, and versions that are kept as long as somebody uses them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.mixing import ServedAdapters
from gaisnet.adapters.state import put_in, take_out
from gaisnet.adapters.tuning import activate, active_adapters, add_adapter, trainable
from gaisnet.errors import AdapterMismatch, UnknownAdapter
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from tests.serving.models import DOMAIN, RELAY, adapter, lively_model, with_adapters

pytestmark = pytest.mark.numeric

ROWS = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))


def new_body() -> Body:
    return cut_decoder(Decoder(lively_model()), CutLayers(0))[1]


def alone(row: int, **adapters: object) -> Tensor:
    """What the row gives on a body of its own that has exactly these adapters."""
    whole = with_adapters(lively_model(), **adapters)  # type: ignore[arg-type]
    output: Tensor = cut_decoder(Decoder(whole), CutLayers(0))[1](ROWS[row : row + 1])
    return output


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to rounding in float32, of outputs that are sums of far larger numbers than the smallest of them."""
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def num_modules(body: Body) -> int:
    return sum(1 for _ in body.modules())


def held(served: ServedAdapters, body: Body) -> tuple[list[str], int]:
    """Versions, and modules of the body: serving adds none."""
    return served.versions, num_modules(body)


def test_every_row_has_its_own() -> None:
    body, one, two, relay = new_body(), adapter(DOMAIN, 1), adapter(DOMAIN, 2), adapter(RELAY, 3)
    served = ServedAdapters(body)
    served.install("one", 0, DOMAIN, one)
    served.install("two", 0, DOMAIN, two)
    served.install("relay", 0, RELAY, relay)
    stacks = [served.acquire(["one"]), served.acquire(["relay", "two"]), served.acquire([])]
    with served.for_rows(stacks):
        found = body(ROWS)
    expected = [
        alone(0, one=(DOMAIN, one)),
        alone(1, two=(DOMAIN, two), relay=(RELAY, relay)),
        alone(2),
    ]
    assert_close(found, torch.cat(expected))
    assert (expected[0] - alone(0)).abs().max() > 0.1


def test_what_learns_on_the_same_body_is_not_disturbed() -> None:
    body = new_body()
    add_adapter(body, "domain", DOMAIN, seed=0)
    for parameter in body.parameters():
        if parameter.shape[-1] == 2:  # B of the adapter, which begins at zero
            parameter.data.fill_(0.3)
    activate(body, ["domain"])
    before, tensors = body(ROWS), take_out(body, "domain")
    served = ServedAdapters(body)
    served.install("domain", 3, DOMAIN, adapter(DOMAIN, 1))
    with served.for_rows([served.acquire([])] * 3):
        assert_close(body(ROWS), new_body()(ROWS))
    assert active_adapters(body) == ["domain"]
    torch.testing.assert_close(body(ROWS), before)
    torch.testing.assert_close(take_out(body, "domain"), tensors)
    activate(body, [])
    with served.for_rows([served.acquire(["domain"])] * 3):
        acting = body(ROWS)
    assert (acting - body(ROWS)).abs().max() > 0.1
    assert active_adapters(body) == []


def test_what_learns_goes_on_learning_through_a_swap() -> None:
    body = new_body()
    add_adapter(body, "domain", DOMAIN, seed=0)
    activate(body, ["domain"])
    learning = {id(p) for p in trainable(body, "domain")}
    served = ServedAdapters(body)
    for version in range(2):
        served.install("domain", version, DOMAIN, adapter(DOMAIN, version))
    assert {id(p) for p in body.parameters() if p.requires_grad} == learning
    body(ROWS).sum().backward()
    assert active_adapters(body) == ["domain"]


def test_a_version_stays_as_long_as_somebody_uses_it() -> None:
    body, old, new = new_body(), adapter(DOMAIN, 1), adapter(DOMAIN, 2)
    served = ServedAdapters(body)
    served.install("domain", 0, DOMAIN, old)
    began = served.acquire(["domain"])
    served.install("domain", 1, DOMAIN, new)
    later = served.acquire(["domain"])
    with served.for_rows([began, later, later]):
        found = body(ROWS)
    expected = [alone(0, d=(DOMAIN, old)), alone(1, d=(DOMAIN, new)), alone(2, d=(DOMAIN, new))]
    assert_close(found, torch.cat(expected))
    assert served.versions == ["domain@0", "domain@1"]
    served.give_back(began)
    assert served.versions == ["domain@1"]
    served.give_back(later)
    assert served.versions == ["domain@1"]  # the present one stays


def test_many_swaps_leave_nothing_behind() -> None:
    body = new_body()
    served = ServedAdapters(body)
    size = num_modules(body)
    for version in range(5):
        served.install("domain", version, DOMAIN, adapter(DOMAIN, version))
        assert held(served, body) == ([f"domain@{version}"], size)
        served.give_back(served.acquire(["domain"]))
    assert sum(len(module._forward_hooks) for module in body.modules()) == 3 * len(DOMAIN.layers)


def test_the_same_version_again_changes_nothing() -> None:
    body = new_body()
    served = ServedAdapters(body)
    served.install("domain", 0, DOMAIN, adapter(DOMAIN, 1))
    served.install("domain", 0, DOMAIN, adapter(DOMAIN, 1))
    assert (served.acquire(["domain"]), served.versions) == (("domain@0",), ["domain@0"])


def test_a_version_that_was_learned_again_does_not_change_what_is_in_use() -> None:
    """A cycle that was broken off gives the same number to other tensors."""
    body = new_body()
    served = ServedAdapters(body)
    versions = []
    for seed in (1, 2, 1):
        served.install("domain", 3, DOMAIN, adapter(DOMAIN, seed))
        versions.append(served.acquire(["domain"]))
    assert versions == [("domain@3",), ("domain@3+",), ("domain@3",)]
    with served.for_rows(versions):
        found = body(ROWS)
    expected = [alone(row, d=(DOMAIN, adapter(DOMAIN, seed))) for row, seed in enumerate((1, 2, 1))]
    assert_close(found, torch.cat(expected))
    for stack in versions:
        served.give_back(stack)
    assert served.versions == ["domain@3"]


def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_served() -> None:
    body = new_body()
    served = ServedAdapters(body)
    served.install("domain", 0, DOMAIN, adapter(DOMAIN, 1))
    fitting, nowhere = adapter(DOMAIN, 2), replace(DOMAIN, layers=(17,))
    infinite = {key: tensor / 0 for key, tensor in fitting.items()}
    shorter = {key: tensor[:1] for key, tensor in fitting.items()}
    for spec, tensors in ((DOMAIN, {}), (DOMAIN, infinite), (DOMAIN, shorter), (RELAY, fitting), (nowhere, {})):
        with pytest.raises(AdapterMismatch):
            served.install("domain", 1, spec, tensors)
        assert served.versions == ["domain@0"]
    assert served.acquire(["domain"]) == ("domain@0",)


def test_a_body_that_learns_later_serves_what_it_served() -> None:
    """Modules that peft wraps afterwards still have their served adapters, and only those."""
    body, tensors = new_body(), adapter(DOMAIN, 1)
    served = ServedAdapters(body)
    served.install("domain", 0, DOMAIN, tensors)
    add_adapter(body, "learns", DOMAIN, seed=0)
    put_in(body, "learns", adapter(DOMAIN, 2))
    activate(body, ["learns"])
    served.install("domain", 1, DOMAIN, tensors)
    with served.for_rows([served.acquire(["domain"]), served.acquire([]), served.acquire(["domain"])]):
        found = body(ROWS)
    expected = [alone(0, d=(DOMAIN, tensors)), alone(1), alone(2, d=(DOMAIN, tensors))]
    assert_close(found, torch.cat(expected))
    learned = [alone(row, d=(DOMAIN, adapter(DOMAIN, 2))) for row in range(3)]
    assert_close(body(ROWS), torch.cat(learned))


def test_what_is_served_is_a_copy() -> None:
    body, tensors = new_body(), adapter(DOMAIN, 1)
    served = ServedAdapters(body)
    served.install("domain", 0, DOMAIN, tensors)
    expected = alone(0, d=(DOMAIN, adapter(DOMAIN, 1)))
    for tensor in tensors.values():
        tensor.zero_()
    with served.for_rows([served.acquire(["domain"])] * 3):
        assert_close(body(ROWS)[:1], expected)


def test_an_unknown_adapter_is_refused_by_name() -> None:
    served = ServedAdapters(new_body())
    served.install("domain", 0, DOMAIN, adapter(DOMAIN, 1))
    with pytest.raises(UnknownAdapter, match="'domian'.*served are: domain"):
        served.acquire(["domian"])


def test_two_adapters_on_one_module_are_refused() -> None:
    served = ServedAdapters(new_body())
    served.install("one", 0, DOMAIN, adapter(DOMAIN, 1))
    served.install("two", 0, DOMAIN, adapter(DOMAIN, 2))
    with pytest.raises(AdapterMismatch, match="beside 'one@0'"):
        served.acquire(["one", "two"])
