"""A split answer is that of ``transformers.generate``, token for token."""

import pytest
import torch
from transformers import DynamicCache

from gaisnet.errors import ContextFull, SessionRefused
from gaisnet.models.families import LLAMA_SHAPED
from gaisnet.models.parts import CACHE, CutLayers
from gaisnet.serving.generation import decoding
from gaisnet.serving.generation.decoding import CachedHead, CachedTail, generate
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import (
    DOMAIN,
    RELAY,
    adapter,
    generated,
    lively_model,
    prompt,
    served,
    served_domain,
    session,
    with_adapters,
)
from tests.tiny import NUM_LAYERS

pytestmark = pytest.mark.numeric

TOKENS = 24
GREEDY = Sampling(max_tokens=TOKENS, stop_ids=frozenset({257}))


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
@pytest.mark.parametrize("cut", [CutLayers(0, 0), CutLayers(2, 0), CutLayers(1, 2)], ids=str)
def test_greedy_equals_generate(family: str, cut: CutLayers) -> None:
    model = lively_model(family, tied=family != "qwen3")
    expected = generated(model, prompt(7), TOKENS)
    parts, service = served(model, cut)
    assert list(generate(parts, session(parts, service), prompt(7), GREEDY)) == expected
    assert len(set(expected)) > TOKENS // 2
    assert (service.num_sessions, service.used_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {}), ("qwen2", {"use_sliding_window": True, "max_window_layers": 3})],
)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_sliding_windows(family: str, changes: dict[str, object], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(family, sliding_window=4, **changes)
    expected = generated(model, prompt(11), TOKENS)
    parts, service = served(model, CutLayers(1, 1))
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", chunk)
    assert list(generate(parts, session(parts, service), prompt(11), GREEDY)) == expected


@pytest.mark.parametrize("kept", [tuple(range(NUM_LAYERS)), (0, 2, 3, 4, 5)], ids=["int8", "int8, one layer fewer"])
def test_a_domain_model(kept: tuple[int, ...]) -> None:
    whole, parts, service = served_domain(lively_model(), kept)
    expected = generated(whole, prompt(7), TOKENS)
    assert list(generate(parts, session(parts, service), prompt(7), GREEDY)) == expected
    ids_BT = torch.tensor([prompt(7)])
    assert (whole(ids_BT).logits - lively_model()(ids_BT).logits).abs().max() > 0.01


def test_a_long_answer_of_an_int8_model_with_adapters() -> None:
    """Every sum is in the same order: one last bit that differs would be a step of 1/63 in some layer, and grow."""
    model, parts, service = served_domain(lively_model(), tuple(range(NUM_LAYERS)))
    domain, relay = adapter(DOMAIN, 1), adapter(RELAY, 2)
    whole = with_adapters(model, domain=(DOMAIN, domain), relay=(RELAY, relay))
    service.install_adapter("domain", 0, DOMAIN, domain)
    service.install_adapter("relay", 0, RELAY, relay)
    ids = prompt(40)
    head, tail = CachedHead(parts), CachedTail(parts, session(parts, service, ("relay", "domain")))
    found = tail.compute_logits(head.smash(ids), want=40)
    cache = {CACHE: DynamicCache(config=whole.config)}
    with torch.no_grad():
        torch.testing.assert_close(found, whole(torch.tensor([ids]), **cache).logits[0], rtol=0, atol=0)
        for token in prompt(60, seed=1):
            expected = whole(torch.tensor([[token]]), **cache).logits[0]
            torch.testing.assert_close(tail.compute_logits(head.smash([token])), expected, rtol=0, atol=0)


def test_adapters() -> None:
    domain, relay = adapter(DOMAIN, 1), adapter(RELAY, 2)
    parts, service = served(lively_model(), CutLayers(1))
    service.install_adapter("domain", 0, DOMAIN, domain)
    service.install_adapter("relay", 0, RELAY, relay)
    whole = with_adapters(lively_model(), domain=(DOMAIN, domain), relay=(RELAY, relay))
    expected = generated(whole, prompt(7), TOKENS)
    assert list(generate(parts, session(parts, service, ("relay", "domain")), prompt(7), GREEDY)) == expected
    assert expected != generated(lively_model(), prompt(7), TOKENS)


def test_it_ends_with_a_stop_token_or_when_nobody_wants_more() -> None:
    model = lively_model()
    expected = generated(model, prompt(7), TOKENS)
    parts, service = served(model, CutLayers(1))
    stops = Sampling(max_tokens=TOKENS, stop_ids=frozenset({expected[4]}))
    assert list(generate(parts, session(parts, service), prompt(7), stops)) == expected[:5]
    tokens = generate(parts, session(parts, service), prompt(7), GREEDY)
    assert [next(tokens) for _ in range(3)] == expected[:3]
    assert service.num_sessions == 1
    tokens.close()
    assert (service.num_sessions, service.used_bytes) == (0, 0)


def test_a_seed_decides_what_is_drawn() -> None:
    parts, service = served(lively_model(), CutLayers(1))

    def drawn(seed: int) -> list[int]:
        sampling = Sampling(max_tokens=TOKENS, temperature=1.5, top_p=0.9, seed=seed)
        return list(generate(parts, session(parts, service), prompt(7), sampling))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([], SessionRefused), ([3, 300], SessionRefused), ([-1], SessionRefused), ([5] * 120, ContextFull)],
)
def test_a_prompt_that_cannot_be_answered(ids: list[int], error: type[Exception]) -> None:
    parts, service = served(lively_model(), CutLayers(1))
    with pytest.raises(error):
        next(iter(generate(parts, session(parts, service), ids, GREEDY)))
    assert service.num_sessions == 0
