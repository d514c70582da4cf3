"""The up flow's gate says what it does, and perplexity is the unsplit model's."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from gaisnet.learning.gate import (
    Verdict,
    accuracy_fell,
    mean_scores,
    perplexity,
    reject,
    strongest_accepted,
    verdict_on_perplexity,
)
from gaisnet.messages import EvaluationReport
from gaisnet.models.families import Decoder
from gaisnet.models.parts import CutLayers, cut_decoder
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.numeric

# -- gate --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "accepted"),
    [(11.5, True), (11.500001, False), (10.0, True), (3.0, True), (math.inf, False), (math.nan, False)],
)
def test_the_gate_lets_through_what_costs_at_most_a_share(now: float, accepted: bool) -> None:
    verdict = verdict_on_perplexity("medical", now, before=10.0, max_increase=0.15)
    assert verdict.accepted is accepted
    assert verdict.limit == pytest.approx(11.5)


def test_an_adapter_that_costs_nothing_passes_the_strictest_gate() -> None:
    assert verdict_on_perplexity("medical", 10.0, before=10.0, max_increase=0.0).accepted


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        (10.257, "accepted 'medical': perplexity on public text 10.26, limit 11.50"),
        (30.0, "refused 'medical': perplexity on public text 30.00, limit 11.50"),
        (math.nan, "refused 'medical': perplexity on public text nan, limit 11.50"),
    ],
)
def test_the_gate_says_what_it_does_and_why(now: float, sentence: str) -> None:
    assert str(verdict_on_perplexity("medical", now, before=10.0, max_increase=0.15)) == sentence


def test_nothing_passes_where_the_model_was_broken_before() -> None:
    assert not verdict_on_perplexity("medical", 10.0, before=math.nan, max_increase=0.15).accepted


def judge_of(cost: float, tried: list[float]) -> Callable[[float], Verdict]:
    """Return a judge of an adapter that raises a perplexity of 10 by ``cost`` times its share."""

    def judge(share: float) -> Verdict:
        tried.append(share)
        return verdict_on_perplexity("medical", 10.0 + cost * share, before=10.0, max_increase=0.15, share=share)

    return judge


@pytest.mark.parametrize(
    ("cost", "share"), [(1.0, 1.0), (1.5, 1.0), (1.6, 0.9375), (2.0, 0.75), (2.9, 0.5), (3.0, 0.5)]
)
def test_an_adapter_over_the_limit_goes_in_as_strong_as_it_may(cost: float, share: float) -> None:
    tried: list[float] = []
    verdict = strongest_accepted(judge_of(cost, tried), least=0.5)
    assert verdict.accepted and verdict.share == pytest.approx(share, abs=1e-9)
    assert verdict.perplexity == pytest.approx(10.0 + cost * share)
    assert len(tried) == (1 if share == 1.0 else 5)


@pytest.mark.parametrize(("cost", "least", "num_tried"), [(3.1, 0.5, 2), (1.6, 1.0, 1), (math.nan, 0.5, 2)])
def test_one_that_would_be_too_weak_is_refused_as_it_is(cost: float, least: float, num_tried: int) -> None:
    tried: list[float] = []
    verdict = strongest_accepted(judge_of(cost, tried), least)
    assert not verdict.accepted and verdict.share == 1.0
    assert len(tried) == num_tried


def test_the_gate_says_how_weak_an_adapter_is() -> None:
    said = str(verdict_on_perplexity("medical", 11.0, before=10.0, max_increase=0.15, share=0.6875))
    assert said == "accepted 'medical' at 69% of its strength: perplexity on public text 11.00, limit 11.50"


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
        assert not verdict_on_perplexity("medical", found, 10.0, 0.15).accepted
    huge = torch.zeros(2, 5, VOCAB)
    huge[..., 1] = 1e6  # exp of a million is beyond any float
    assert not verdict_on_perplexity(
        "medical", perplexity(huge, lambda r: r, torch.zeros(2, 5, dtype=torch.long)), 10.0, 0.15
    ).accepted


# -- what devices report -----------------------------------------------------------------------------------------------


def report(right: int, of: int, loss: float = 1.0) -> EvaluationReport:
    return EvaluationReport(of, right, of, loss * of)


@pytest.mark.parametrize(
    ("before", "after", "of", "most", "worse"),
    [
        (50, 50, 100, 0.0, False),
        (50, 80, 100, 0.0, False),
        (50, 35, 100, 0.0, True),  # two standard errors are 13.8 points
        (50, 37, 100, 0.0, False),
        (50, 35, 100, 0.02, False),
        (5, 1, 10, 0.0, True),  # 40.3 points
        (6, 3, 10, 0.0, False),
        (10, 9, 10, 0.02, False),
        (10, 0, 10, 0.02, True),
        (5000, 4800, 10_000, 0.0, True),
    ],
)
def test_a_fall_is_more_than_is_allowed_and_than_chance_explains(
    before: int, after: int, of: int, most: float, worse: bool
) -> None:
    assert accuracy_fell(report(before, of), report(after, of), most) is worse


def test_nothing_falls_on_other_examples() -> None:
    assert not accuracy_fell(report(9, 10), report(0, 11), 0.0)
    assert not accuracy_fell(report(9, 10), EvaluationReport(10, 0, 12, 1.0), 0.0)


def test_standing_is_the_mean_over_domains_whatever_their_sizes_then_the_loss() -> None:
    assert mean_scores([report(1, 2), report(0, 100)])[0] == pytest.approx(0.25)
    assert mean_scores([report(1, 2, loss=0.5)]) > mean_scores([report(1, 2, loss=0.6)])
    assert mean_scores([report(2, 2, loss=9.0)]) > mean_scores([report(1, 2, loss=0.1)])


def test_a_verdict_says_how_an_adapter_came_to_be_and_what_was_reported() -> None:
    verdict = verdict_on_perplexity("merged", 10.0, before=10.0, max_increase=0.15)
    told = replace(verdict, origin=" after a last mile of 3 steps", device_feedback="devices say 71.0% right")
    found = "perplexity on public text 10.00, limit 11.50"
    assert str(told) == f"accepted 'merged' after a last mile of 3 steps: {found}; devices say 71.0% right"
    assert str(reject("merged", "nobody is there")) == "refused 'merged': nobody is there"
