"""Speculation changes the speed of an answer and not the answer."""

from collections import Counter
from typing import Any

import pytest
import torch

from gaisnet.models.families import LLAMA_SHAPED
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.generation.decoding import DeviceParts, generate
from gaisnet.serving.generation.speculation import DraftLength, Tally, generate_speculatively, verify_draft
from gaisnet.serving.generation.text import Sampler, Sampling
from tests.serving.models import generated, lively_model, prompt, served, served_domain, session
from tests.tiny import NUM_LAYERS

pytestmark = pytest.mark.numeric

TOKENS = 24
SLIDING = {"sliding_window": 4}


def speculative(
    parts: DeviceParts, small: BodyService, large: BodyService, sampling: Sampling, tally: Tally, longest: int = 4
) -> list[int]:
    sessions = session(parts, small), session(parts, large)
    return list(generate_speculatively(parts, *sessions, prompt(7), sampling, DraftLength(longest), tally))


@pytest.mark.parametrize("kept", [tuple(range(NUM_LAYERS)), (0, 1, 3, 4, 5)], ids=["int8", "int8, one layer fewer"])
@pytest.mark.parametrize("longest", [1, 3, 8])
def test_greedy_equals_the_large_model(kept: tuple[int, ...], longest: int) -> None:
    model, tally = lively_model(), Tally()
    expected = generated(model, prompt(7), TOKENS)
    parts, large = served(model, CutLayers(1))
    _, _, small = served_domain(lively_model(), kept)
    assert speculative(parts, small, large, Sampling(max_tokens=TOKENS), tally, longest) == expected
    assert tally.num_tokens == TOKENS
    assert (small.num_sessions, large.num_sessions, small.used_bytes, large.used_bytes) == (0, 0, 0, 0)


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_rejections_roll_every_part_back(family: str) -> None:
    """The drafter is another model, which is refused nearly always; the tail has layers, and windows slide."""
    changes = SLIDING if family == "mistral" else {}
    model, tally = lively_model(family, **changes), Tally()
    expected = generated(model, prompt(7), TOKENS)
    parts, large = served(model, CutLayers(2, 1))
    _, small = served(lively_model(family, seed=9, **changes), CutLayers(2, 1))
    assert speculative(parts, small, large, Sampling(max_tokens=TOKENS), tally) == expected
    assert tally.num_accepted < tally.num_drafted


def test_it_accepts_what_the_paper_accepts() -> None:
    """The algorithm without caches: greedy, three tokens at a time, each model in one piece."""
    model = lively_model()
    small_whole, parts, small = served_domain(lively_model(), (0, 1, 3, 4, 5))
    _, large = served(lively_model(), CutLayers(1))
    ids, expected = prompt(7), Tally()
    while (left := TOKENS - expected.num_tokens) > 0:
        num = min(3, left - 1)
        drafted = generated(small_whole, ids, num) if num else []
        checked = generated(model, ids, num + 1)
        accepted = next((i for i in range(num) if drafted[i] != checked[i]), num)
        ids = [*ids, *checked[: accepted + 1]]
        expected.num_checks += 1
        expected.num_drafted += num
        expected.num_accepted += accepted
        expected.num_tokens += accepted + 1
    tally, sessions = Tally(), (session(parts, small), session(parts, large))
    always_three = DraftLength(longest=3, cost=0)
    found = list(generate_speculatively(parts, *sessions, prompt(7), Sampling(max_tokens=TOKENS), always_three, tally))
    assert found == ids[7:]
    assert tally == expected
    assert 0 < tally.num_accepted < tally.num_drafted


def test_a_perfect_drafter_is_always_accepted() -> None:
    tally = Tally()
    parts, large = served(lively_model(), CutLayers(1))
    _, small = served(lively_model(), CutLayers(1))
    assert len(speculative(parts, small, large, Sampling(max_tokens=TOKENS), tally)) == TOKENS
    assert tally.num_accepted == tally.num_drafted
    assert tally.num_checks < TOKENS / 3


def test_a_stop_token_ends_it() -> None:
    model = lively_model()
    expected = generated(model, prompt(7), TOKENS)
    parts, large = served(model, CutLayers(1))
    _, small = served(lively_model(), CutLayers(1))
    sampling = Sampling(max_tokens=TOKENS, stop_ids=frozenset({expected[5]}))
    assert speculative(parts, small, large, sampling, Tally()) == expected[:6]
    assert (small.num_sessions, large.num_sessions) == (0, 0)


def same_shares(found: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its degrees of freedom: about 1 where the distributions are the same."""
    total = sum(found.values())
    terms = [(found[key] - total * share) ** 2 / (total * share) for key, share in expected.items() if share]
    assert set(found) <= {key for key, share in expected.items() if share}
    return sum(terms) / (len(terms) - 1)


def test_the_judge_keeps_the_distribution() -> None:
    """Two tokens of three, drafted from wrong probabilities: what comes out is as if the right ones had been drawn."""
    drafts_KV = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]])
    checks_KV = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.0, 0.6], [0.3, 0.3, 0.4]])
    sampler = Sampler(Sampling(temperature=1, seed=2))
    firsts, seconds = Counter[tuple[int, ...]](), Counter[tuple[int, ...]]()
    for _ in range(4000):
        tokens = verify_draft([sampler.draw(row) for row in drafts_KV], drafts_KV, checks_KV, sampler)
        firsts[tokens[0],] += 1
        if len(tokens) > 1:
            seconds[tokens[1],] += 1
    assert same_shares(firsts, {(i,): p for i, p in enumerate(checks_KV[0].tolist())}) < 4
    assert same_shares(seconds, {(i,): p for i, p in enumerate(checks_KV[1].tolist())}) < 4
    accepted = sum(min(p, q) for p, q in zip(drafts_KV[0].tolist(), checks_KV[0].tolist(), strict=True))
    assert seconds.total() / 4000 == pytest.approx(accepted, abs=0.03)


def test_sampled_answers_are_distributed_as_the_large_models() -> None:
    """Three tokens out of a vocabulary of three, all parts in their real places."""
    tiny: dict[str, Any] = {
        "vocab_size": 3,
        "num_hidden_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.6,
    }
    model, other = lively_model(**tiny), lively_model(**tiny, seed=4)
    other.lm_head.weight = model.lm_head.weight
    other.model.embed_tokens.weight = model.model.embed_tokens.weight
    parts, large = served(model, CutLayers(0))
    _, small = served(other, CutLayers(0))
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        expected = {
            (*ids, token): share * p
            for ids, share in expected.items()
            for token, p in enumerate(model(torch.tensor([[2, *ids]])).logits[0, -1].softmax(0).tolist())
        }
    found, tally = Counter[tuple[int, ...]](), Tally()
    for seed in range(250):
        sampling = Sampling(max_tokens=3, temperature=1, seed=seed)
        sessions = session(parts, small), session(parts, large)
        found[tuple(generate_speculatively(parts, *sessions, [2], sampling, DraftLength(2), tally))] += 1
    assert same_shares(found, expected) < 2
    assert 0.2 < tally.num_accepted / tally.num_drafted < 0.95


def test_drafts_grow_and_shrink_with_acceptance() -> None:
    length = DraftLength(longest=8, cost=0.1)
    for _ in range(30):
        length.record_draft(4, 4)
    assert length.acceptance == pytest.approx(1, abs=0.01)
    assert length.choose_length() == 8
    for _ in range(60):
        length.record_draft(4, 0)
    assert length.choose_length() == 1
    for _ in range(60):
        length.record_draft(4, 2)  # two right, the third wrong: two of three
    assert length.acceptance == pytest.approx(2 / 3, abs=0.01)
    assert length.choose_length() == 4  # by hand: 1.76, 1.85, 1.86 and 1.82 tokens per unit of time for 2, 3, 4 and 5


def test_a_seed_decides_what_is_drawn() -> None:
    parts, large = served(lively_model(), CutLayers(1))
    _, _, small = served_domain(lively_model())
    sampling = Sampling(max_tokens=TOKENS, temperature=1.2, seed=3)
    first = speculative(parts, small, large, sampling, Tally())
    assert speculative(parts, small, large, sampling, Tally()) == first
    assert len(list(generate(parts, session(parts, large), prompt(7), sampling))) == TOKENS
