"""Frozen linear layers: the same numbers as torch's own, forward and backward, and nothing that learns."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from gaisnet.models.frozen import FrozenLinear, freeze_linears, quick_products

pytestmark = pytest.mark.numeric


def pair(bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A plain layer, and a frozen one of the same weights."""
    plain, frozen = nn.Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    frozen.load_state_dict(plain.state_dict())
    freeze_linears(frozen)
    return plain, frozen


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the product has run on oneDNN: one entry per call."""
    calls: list[int] = []
    real = torch.ops.mkldnn._linear_pointwise

    def count(*args: Any) -> torch.Tensor:
        calls.append(len(args))
        result: torch.Tensor = real(*args)
        return result

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", count)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 7, 24), (0, 24)], ids=str)
def test_outputs_and_gradients_are_those_of_a_plain_layer(
    bias: bool, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, frozen = pair(bias)
    calls = counted(monkeypatch)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    outputs = [layer(each) for layer, each in zip((plain, frozen), inputs, strict=True)]
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-4)
    assert len(calls) == 2  # forward and backward
    assert all(p.grad is None for p in frozen.parameters())


def test_an_input_and_a_gradient_that_do_not_lie_in_a_row() -> None:
    plain, frozen = pair(bias=True)
    base = torch.randn(24, 6)
    inputs = [base.clone().requires_grad_() for _ in range(2)]
    for layer, each in zip((plain, frozen), inputs, strict=True):
        layer(each.t()).sum().backward()  # a sum's gradient is one number, expanded
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-5, atol=1e-5)


def test_other_dtypes_go_on_as_they_did(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, frozen = pair(bias=True)
    calls = counted(monkeypatch)
    rows = torch.randn(3, 24, dtype=torch.float64)
    assert torch.equal(frozen.double()(rows), plain.double()(rows))
    assert not calls


def test_tied_weights_stay_tied() -> None:
    embed, head = nn.Embedding(40, 24), nn.Linear(24, 40, bias=False)
    head.weight = embed.weight
    freeze_linears(nn.Sequential(embed, head))
    assert type(head) is FrozenLinear
    assert head.weight is embed.weight


def test_what_learns_goes_the_way_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    for name in ("weight", "bias"):
        _, frozen = pair(bias=True)
        getattr(frozen, name).requires_grad_()
        frozen(torch.randn(3, 24)).sum().backward()
        assert getattr(frozen, name).grad is not None
    assert not calls


def test_hooks_and_copies_go_on() -> None:
    layer, seen = nn.Linear(24, 40), []
    layer.register_forward_hook(lambda *args: seen.append(args[2].shape))
    freeze_linears(layer)
    twin = copy.deepcopy(layer)
    rows = torch.randn(3, 24)
    assert torch.equal(twin(rows), layer(rows))
    assert seen == [(3, 40)] * 2
    assert type(twin) is FrozenLinear


def test_an_adapter_of_peft_learns_beside_it() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(24, 40)})
    freeze_linears(model)
    adapted: Any = inject_adapter_in_model(LoraConfig(r=2, target_modules=["proj"]), model)
    adapted["proj"](torch.randn(3, 24)).square().sum().backward()
    gradients = {name: p.grad is not None for name, p in adapted.named_parameters()}
    assert {name for name, has in gradients.items() if has} == {
        "proj.lora_A.default.weight",
        "proj.lora_B.default.weight",
    }
    assert type(adapted["proj"].base_layer) is FrozenLinear


@pytest.mark.parametrize("rows", [1, 2, 16, 256])
def test_quick_products_give_the_same_numbers(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frozen = pair(bias=True)
    weights: list[torch.Tensor] = []
    real = torch.ops.mkldnn._linear_pointwise

    def note(*args: Any) -> torch.Tensor:
        weights.append(args[1])
        result: torch.Tensor = real(*args)
        return result

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", note)
    found = []
    for context in (nullcontext(), quick_products(nn.Sequential(frozen))):
        inputs = torch.randn(rows, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with context:
            output = frozen(inputs)
            output.square().sum().backward()
        found.append((output.detach(), inputs.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    once, _, again, for_input = weights
    assert once is frozen.weight
    assert again.t().is_contiguous() and torch.equal(again, frozen.weight)
    assert for_input.data_ptr() == frozen.weight.data_ptr()


def test_answers_do_not_see_the_second_copy_and_it_goes() -> None:
    _, frozen = pair(bias=False)
    with pytest.raises(ValueError), quick_products(frozen):
        frozen._columns = torch.full_like(frozen.weight, float("nan"))
        with torch.no_grad():
            assert torch.isfinite(frozen(torch.randn(1, 24))).all()
        assert frozen(torch.randn(1, 24)).isnan().all()
        raise ValueError
    assert frozen._columns is None
