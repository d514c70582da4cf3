"""A dishonest device is excluded by name, and the others' result is that of a round without it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.errors import GaisnetError, OutOfBounds, WireFormatError
from gaisnet.messages import MOST, AdapterUpdate, BodyOutputGrad, EvaluationReport, Message, SmashedData
from gaisnet.tiers.split import bounds
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.transport.codec import Codec
from tests.tiers.test_edge_faults import (
    ALL_NAMES,
    World,
    answers,
    assert_equal,
    config_for,
    others,
    score_without,
    undisturbed,
)

pytestmark = pytest.mark.numeric

Lie = Callable[[Any], Message]
HUGE = 10**400


def scaled(factor: float) -> Lie:
    return lambda update: replace(update, tensors={key: tensor * factor for key, tensor in update.tensors.items()})


def one_example_of(num_positions: int) -> Lie:
    def change(smashed: SmashedData) -> SmashedData:
        length_E, label_E = (torch.tensor([n], dtype=torch.int32) for n in (num_positions, 1))
        rows_ND = torch.ones(num_positions, smashed.hidden_ND.shape[1])
        return replace(smashed, lengths_E=length_E, num_labels_E=label_E, hidden_ND=rows_ND)

    return change


def many_examples_of_one_position(num: int) -> Lie:
    def change(smashed: SmashedData) -> SmashedData:
        ones_E = torch.ones(num, dtype=torch.int32)
        rows_ND = torch.ones(num, smashed.hidden_ND.shape[1])
        return replace(smashed, lengths_E=ones_E, num_labels_E=ones_E, hidden_ND=rows_ND)

    return change


LIES = {
    "claims 10**9 examples": (AdapterUpdate, lambda m: replace(m, num_examples=10**9)),
    "claims 10**400 examples": (AdapterUpdate, lambda m: replace(m, num_examples=HUGE)),
    "claims 10**5000 steps": (AdapterUpdate, lambda m: replace(m, num_steps=10**5000)),
    "loss of 1.7e308": (AdapterUpdate, lambda m: replace(m, loss=1.7e308)),
    "another cycle": (AdapterUpdate, lambda m: replace(m, version=m.version + 1)),
    "with word of others": (AdapterUpdate, lambda m: replace(m, faults=("split-a lies",))),
    "update times 1e18": (AdapterUpdate, scaled(1e18)),
    "update times 1000": (AdapterUpdate, scaled(1e3)),
    "12,000 positions": (SmashedData, one_example_of(12_000)),
    "100,000 examples": (SmashedData, many_examples_of_one_position(100_000)),
    "activations of 1e38": (SmashedData, lambda m: replace(m, hidden_ND=torch.full_like(m.hidden_ND, 1e38))),
}
ALWAYS = ("claims 10**9 examples", "update times 1e18", "12,000 positions")


@pytest.mark.parametrize("lie", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow, id=n) for n in LIES])
def test_a_device_that_lies_is_left_out_by_name_and_the_others_learn_as_without_it(lie: str) -> None:
    kind, change = LIES[lie]
    name = "local-a" if kind is AdapterUpdate else "split-a"
    world = World(config_for(ALL_NAMES)).installed()
    world.links[name].change = answers(kind, change)
    update = world.fine_tune()
    (fault,) = update.faults
    assert f"without {name}: " in fault and f"of device '{name}': " in fault
    assert_equal(replace(update, faults=()), undisturbed(others(name)))


def test_an_example_longer_than_the_context_costs_the_edge_nothing() -> None:
    """It is refused before a layer runs: the cost of attention is quadratic."""
    world = World(config_for(("split-a", "split-b"))).installed()
    world.links["split-a"].change = answers(SmashedData, one_example_of(49))
    assert (
        "the length of an example of device 'split-a': 49, where a number from 1 to 48" in world.fine_tune().faults[0]
    )


GRADIENTS = {
    "3e38": lambda m: replace(m, grad_ND=torch.full_like(m.grad_ND, 3e38)),
    "1e30": lambda m: replace(m, grad_ND=torch.full_like(m.grad_ND, 1e30)),
    "loss 1.7e308": lambda m: replace(m, loss_sum=1.7e308),
    "loss -1": lambda m: replace(m, loss_sum=-1.0),
}


@pytest.mark.parametrize(
    "lie", ["3e38", *(pytest.param(n, marks=pytest.mark.slow) for n in ("1e30", "loss 1.7e308", "loss -1"))]
)
def test_who_sends_an_impossible_gradient_is_blamed_and_no_other(lie: str) -> None:
    world = World(config_for(ALL_NAMES, batch_size=64)).installed()
    world.links["split-a"].change = answers(BodyOutputGrad, GRADIENTS[lie])
    update = world.fine_tune()
    (fault,) = update.faults
    assert "without split-a: " in fault
    expected = World(config_for(others("split-a"), batch_size=64)).installed().fine_tune()
    assert update.num_examples == expected.num_examples
    for key, tensor in expected.tensors.items():
        torch.testing.assert_close(update.tensors[key], tensor, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lie", [float("nan"), float("inf"), 1.7e308, -1.0])
def test_a_report_with_an_impossible_loss_is_left_out_by_name(lie: float, caplog: pytest.LogCaptureFixture) -> None:
    world = World(config_for(ALL_NAMES)).installed()
    world.fine_tune()
    world.links["split-a"].change = answers(EvaluationReport, lambda m: replace(m, loss_sum=lie))
    found = world.score()
    assert "edge 'edge' scores without split-a: the loss of device 'split-a': " in caplog.text
    assert found.num_examples == score_without("split-a").num_examples


@pytest.fixture
def without_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the bounds on gradients and distances."""
    monkeypatch.setattr(bounds, "clip_gradient", lambda name, reply, limit: reply)
    monkeypatch.setattr(bounds, "check_distance", lambda *_: None)


def test_an_honest_round_is_the_same_to_the_last_bit_without_bounds(without_bounds: None) -> None:
    assert_equal(World(config_for(ALL_NAMES)).installed().fine_tune(), undisturbed())


def grad(rows: Tensor) -> BodyOutputGrad:
    return BodyOutputGrad(0, 1.0, rows)


def test_a_gradient_is_clipped_above_its_limit_and_untouched_below() -> None:
    rows_ND = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    norm = float(rows_ND.double().norm())
    assert bounds.clip_gradient("a", grad(rows_ND), norm).grad_ND is rows_ND
    clipped = bounds.clip_gradient("a", grad(rows_ND), norm / 10).grad_ND
    torch.testing.assert_close(clipped, rows_ND / 10)
    with pytest.raises(OutOfBounds, match="the norm of a gradient of device 'a'"):
        bounds.clip_gradient("a", grad(rows_ND), norm / 1e4)


def test_no_label_makes_a_gradient_steeper_than_the_limit() -> None:
    """Use the worst label, on rows of all sizes, through a norm and a vocabulary head."""
    generator = torch.Generator().manual_seed(0)
    norm, head_VD = torch.nn.RMSNorm(8), 3.0 * torch.randn(20, 8, generator=generator)
    norm.weight.data = torch.randn(8, generator=generator)
    gradient_bounds = GradientBounds(
        2.0 * float(head_VD.norm(dim=-1).max()) * float(norm.weight.detach().abs().max()), normed=True
    )
    for size in (1e-3, 1.0, 1e3):
        rows_ND = (size * torch.randn(5, 8, generator=generator)).requires_grad_()
        logits_NV = norm(rows_ND) @ head_VD.T
        worst_N = logits_NV.argmin(dim=-1)
        torch.nn.functional.cross_entropy(logits_NV, worst_N).backward()
        assert rows_ND.grad is not None
        assert 0.0 < float(rows_ND.grad.norm()) <= gradient_bounds.norm_limit(rows_ND.detach(), 5)


def test_adamw_never_comes_further_than_the_reach() -> None:
    """Use gradients that grow as fast as moves AdamW furthest."""
    settings = config_for(ALL_NAMES).fine_tune
    for growth in (1.0, 1.5, 10.0):
        weight = torch.nn.Parameter(torch.zeros(1))
        start = {"w": weight.detach().clone()}
        optimizer = torch.optim.AdamW([weight], lr=settings.learning_rate, weight_decay=0.0)
        for step in range(20):
            weight.grad = torch.tensor([growth**step])
            optimizer.step()
            bounds.check_distance("a", start, {"w": weight.detach()}, step + 1, settings)
        with pytest.raises(OutOfBounds):
            bounds.check_distance("a", start, {"w": torch.tensor([10.0 * 20 * settings.learning_rate])}, 20, settings)


def test_nobody_has_many_times_as_many_examples_as_the_others() -> None:
    assert bounds.find_outnumbering({"a": 5, "b": 100, "c": 5}, 20.0, 0) == {}
    assert bounds.find_outnumbering({"a": 5, "b": 101, "c": 5}, 20.0, 0).keys() == {"b"}
    assert bounds.find_outnumbering({"a": 5, "b": 101, "c": 5}, 20.0, 101) == {}
    assert bounds.find_outnumbering({"a": 10**9}, 20.0, 0) == {}
    assert bounds.find_outnumbering({"a": 5, "b": MOST}, 20.0, 0).keys() == {"b"}


@pytest.mark.parametrize("number", [2**63, HUGE, -(2**63) - 1])
def test_a_whole_number_beyond_64_bits_is_no_message(number: int) -> None:
    codec = Codec(config_for(ALL_NAMES).wire)
    frame = codec.encode(EvaluationReport(number, 0, 1, 0.0))
    with pytest.raises(WireFormatError, match="which 64 bits cannot hold"):
        codec.decode(frame)


@pytest.mark.parametrize("number", [2**63 - 1, -(2**63)])
def test_a_whole_number_of_64_bits_crosses(number: int) -> None:
    codec = Codec(config_for(ALL_NAMES).wire)
    assert codec.decode(codec.encode(EvaluationReport(number, 0, 1, 0.0))) == EvaluationReport(number, 0, 1, 0.0)


def test_an_error_says_who_sent_what_and_what_to_do() -> None:
    with pytest.raises(GaisnetError) as raised:
        bounds.check_integer("device 'a'", "the number of examples", HUGE, 1, 7)
    assert str(raised.value) == (
        "the number of examples of device 'a': a number of 1329 bits, where a number from 1 to 7 belongs; "
        "it is left out; look at what runs at that site"
    )
