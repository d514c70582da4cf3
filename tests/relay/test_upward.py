"""The up flow: the merged adapter is an exact sum, the gate says what it does, perplexity is the unsplit model's."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.relay.upward import Verdict, gate, merge, perplexity, strongest, weakened
from tests.tiny import VOCAB, tiny_model

TARGETS = ("q_proj", "down_proj")
SPEC = LoraSpec(2, 6, TARGETS, (3, 4, 5))


def body_with(*names: str) -> Body:
    """A body with random adapters, all inactive."""
    _, body, _ = cut_decoder(Decoder(tiny_model(initializer_range=0.2)), CutLayers(1, 0))
    for seed, name in enumerate(names):
        add_adapter(body, name, SPEC, seed)
        generator = torch.Generator().manual_seed(seed)
        put_in(
            body, name, {k: torch.randn(t.shape, generator=generator) * 0.3 for k, t in take_out(body, name).items()}
        )
    return body


def product(adapter: AdapterTensors, module: str, alpha: int, rank: int) -> Tensor:
    a, b = adapter[f"{module}.lora_A.weight"].double(), adapter[f"{module}.lora_B.weight"].double()
    return b @ a * alpha / rank


def hidden() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


# -- merge -------------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    first = {"x.lora_A.weight": torch.tensor([[1.0, 2.0]]), "x.lora_B.weight": torch.tensor([[3.0], [0.0]])}
    second = {"x.lora_A.weight": torch.tensor([[0.0, -1.0]]), "x.lora_B.weight": torch.tensor([[1.0], [4.0]])}
    merged = merge([first, second], weight=0.5)
    # B A: [[3, 6], [0, 0]] and [[0, -1], [0, -4]]; half of their sum is [[1.5, 2.5], [0, -2]]
    assert torch.equal(merged["x.lora_B.weight"] @ merged["x.lora_A.weight"], torch.tensor([[1.5, 2.5], [0.0, -2.0]]))


@pytest.mark.parametrize("weight", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_its_product_is_the_weighted_sum_of_all_products(names: tuple[str, ...], weight: float) -> None:
    body = body_with(*names)
    adapters = [take_out(body, name) for name in names]
    merged = merge(adapters, weight)
    assert merged.keys() == adapters[0].keys()
    for module in {key.rsplit(".", 2)[0] for key in merged}:
        # The scale alpha / rank stays the same: both grow with the number of adapters.
        found = product(merged, module, SPEC.alpha * len(names), SPEC.rank * len(names))
        expected = sum((product(a, module, SPEC.alpha, SPEC.rank) for a in adapters), torch.tensor(0.0)) * weight
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_it_loads_as_an_adapter_of_higher_rank_that_acts_like_all_together() -> None:
    body = body_with("a", "b")
    add_adapter(body, "merged", LoraSpec(2 * SPEC.rank, 2 * SPEC.alpha, TARGETS, SPEC.layers), seed=9)
    put_in(body, "merged", merge([take_out(body, "a"), take_out(body, "b")], weight=1.0))
    base = body(hidden())
    activate(body, ("a", "b"))
    expected = body(hidden())
    activate(body, ("merged",))
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(body(hidden()), expected, atol=1e-5, rtol=1e-5)


def test_merging_new_adapters_merges_nothing() -> None:
    body = body_with("a")
    add_adapter(body, "new", SPEC, seed=3)
    merged = merge([take_out(body, "new")] * 2, weight=1.0)
    assert not any(bool(t.any()) for key, t in merged.items() if ".lora_B." in key)


def test_merging_leaves_the_parts() -> None:
    adapters = [take_out(body_with("a"), "a") for _ in range(2)]
    before = [{key: tensor.clone() for key, tensor in adapter.items()} for adapter in adapters]
    for tensor in merge(adapters, weight=0.5).values():
        tensor.zero_()
    assert all(torch.equal(a[key], b[key]) for a, b in zip(adapters, before, strict=True) for key in a)


# -- gate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "accepted"),
    [(11.5, True), (11.500001, False), (10.0, True), (3.0, True), (math.inf, False), (math.nan, False)],
)
def test_the_gate_lets_through_what_costs_at_most_a_share(now: float, accepted: bool) -> None:
    verdict = gate("medical", now, before=10.0, max_increase=0.15)
    assert verdict.accepted is accepted
    assert verdict.limit == pytest.approx(11.5)


def test_an_adapter_that_costs_nothing_passes_the_strictest_gate() -> None:
    assert gate("medical", 10.0, before=10.0, max_increase=0.0).accepted


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (10.257, "accepted 'medical': perplexity on public text 10.26, limit 11.50"),
        (30.0, "refused 'medical': perplexity on public text 30.00, limit 11.50"),
        (math.nan, "refused 'medical': perplexity on public text nan, limit 11.50"),
    ],
)
def test_the_gate_says_what_it_does_and_why(now: float, sentence: str) -> None:
    assert str(gate("medical", now, before=10.0, max_increase=0.15)) == sentence


def test_nothing_passes_where_the_model_was_broken_before() -> None:
    assert not gate("medical", 10.0, before=math.nan, max_increase=0.15).accepted


def judge_of(cost: float, tried: list[float]) -> Callable[[float], Verdict]:
    """Of an adapter that raises a perplexity of 10 by ``cost`` times its share."""

    def judge(share: float) -> Verdict:
        tried.append(share)
        return gate("medical", 10.0 + cost * share, before=10.0, max_increase=0.15, share=share)

    return judge


@pytest.mark.parametrize(
    ("cost", "share"), [(1.0, 1.0), (1.5, 1.0), (1.6, 0.9375), (2.0, 0.75), (2.9, 0.5), (3.0, 0.5)]
)
def test_an_adapter_over_the_limit_goes_in_as_strong_as_it_may(cost: float, share: float) -> None:
    tried: list[float] = []
    verdict = strongest(judge_of(cost, tried), least=0.5)
    assert verdict.accepted and verdict.share == pytest.approx(share, abs=1e-9)
    assert verdict.perplexity == pytest.approx(10.0 + cost * share)
    assert len(tried) == (1 if share == 1.0 else 5)


@pytest.mark.parametrize(("cost", "least", "num_tried"), [(3.1, 0.5, 2), (1.6, 1.0, 1), (math.nan, 0.5, 2)])
def test_one_that_would_be_too_weak_is_refused_as_it_is(cost: float, least: float, num_tried: int) -> None:
    tried: list[float] = []
    verdict = strongest(judge_of(cost, tried), least)
    assert not verdict.accepted and verdict.share == 1.0
    assert len(tried) == num_tried


def test_the_gate_says_how_weak_an_adapter_is() -> None:
    said = str(gate("medical", 11.0, before=10.0, max_increase=0.15, share=0.6875))
    assert said == "accepted 'medical' at 69% of its strength: perplexity on public text 11.00, limit 11.50"


def test_a_weakened_adapters_products_are_a_share() -> None:
    adapter = take_out(body_with("a"), "a")
    weak = weakened(adapter, 0.25)
    for module in {key.rsplit(".", 2)[0] for key in adapter}:
        assert torch.allclose(product(weak, module, 6, 2), 0.25 * product(adapter, module, 6, 2))


# -- perplexity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_windows", "length"), [(1, 2), (3, 16), (10, 120)])  # the last has more rows than a chunk
@pytest.mark.parametrize("cut", [CutLayers(1, 0), CutLayers(2, 2)])
def test_perplexity_is_that_of_the_unsplit_model(num_windows: int, length: int, cut: CutLayers) -> None:
    model = tiny_model(initializer_range=0.2)
    head, body, tail = cut_decoder(Decoder(model), cut)
    ids_BT = torch.randint(VOCAB, (num_windows, length), generator=torch.Generator().manual_seed(2))
    log_losses = [
        F.cross_entropy(model(ids_BT[b : b + 1]).logits[0, t], ids_BT[b, t + 1]).item()
        for b in range(num_windows)
        for t in range(length - 1)
        if num_windows * length < 1000 or t == 0
    ]
    output_BTD = tail.stack.run(body(head(ids_BT)))
    found = perplexity(output_BTD, tail.logits, ids_BT)
    if num_windows * length < 1000:
        assert found == pytest.approx(math.exp(sum(log_losses) / len(log_losses)), rel=1e-5)
    assert found == pytest.approx(math.exp(model(ids_BT, labels=ids_BT).loss.item()), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    ids_BT = torch.randint(VOCAB, (4, 9))
    found = perplexity(torch.zeros(4, 9, 32), lambda rows_ND: torch.zeros(len(rows_ND), VOCAB), ids_BT)
    assert found == pytest.approx(VOCAB)


def test_a_model_that_is_broken_has_a_perplexity_that_the_gate_refuses() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        output_BTD = torch.full((2, 5, VOCAB), odd)
        found = perplexity(output_BTD, lambda rows_ND: rows_ND, torch.zeros(2, 5, dtype=torch.long))
        assert not gate("medical", found, 10.0, 0.15).accepted
    huge = torch.zeros(2, 5, VOCAB)
    huge[..., 1] = 1e6  # exp of a million is beyond any float
    assert not gate("medical", perplexity(huge, lambda r: r, torch.zeros(2, 5, dtype=torch.long)), 10.0, 0.15).accepted
