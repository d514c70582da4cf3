"""Drawing tokens, against figures worked out by hand and against transformers."""

import pytest
import torch
from transformers import TopPLogitsWarper

from gaisnet.errors import SessionRefused
from gaisnet.serving.generation.text import Sampler, Sampling

LOGITS = torch.tensor([0.5, 0.2, 0.25, 0.05]).log()


def test_greedy_puts_all_on_the_likeliest() -> None:
    sampler = Sampler(Sampling())
    assert sampler.probabilities(LOGITS).tolist() == [1, 0, 0, 0]
    assert sampler.draw(sampler.probabilities(LOGITS)) == 0


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.3, [1.0, 0, 0, 0]),
        (0.6, [2 / 3, 0, 1 / 3, 0]),
        (0.8, [10 / 19, 4 / 19, 5 / 19, 0]),
        (1.0, [0.5, 0.2, 0.25, 0.05]),
    ],
)
def test_a_nucleus_by_hand(top_p: float, expected: list[float]) -> None:
    found = Sampler(Sampling(temperature=1, top_p=top_p)).probabilities(LOGITS)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_it_draws_from_what_transformers_draws_from() -> None:
    logits_BV = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Sampling(temperature=0.7, top_p=0.85))
    expected = TopPLogitsWarper(0.85)(torch.zeros(20, 1), logits_BV / 0.7).softmax(-1)
    torch.testing.assert_close(torch.stack([sampler.probabilities(row) for row in logits_BV]), expected)


def test_draws_have_the_right_shares() -> None:
    sampler = Sampler(Sampling(temperature=1, seed=5))
    drawn = torch.tensor([sampler.draw(sampler.probabilities(LOGITS)) for _ in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.2, 0.25, 0.05]), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SessionRefused, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-45, 1e-38, 1e-10, 9e-6, -0.0])
def test_a_temperature_next_to_nothing_takes_the_likeliest(temperature: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature))
    probabilities = sampler.probabilities(1000 * LOGITS)
    assert probabilities.tolist() == [1, 0, 0, 0]
    assert sampler.draw(probabilities) == 0
    assert not sampler.accepts(0.999)


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 2.0])
@pytest.mark.parametrize("top_p", [5e-324, 1e-320, 1e-46, 1e-8, 0.5])
def test_the_smallest_nucleus_is_the_likeliest_token(temperature: float, top_p: float) -> None:
    sampler = Sampler(Sampling(temperature=temperature, top_p=top_p))
    probabilities = sampler.probabilities(20 * LOGITS)
    assert probabilities.tolist() == [1, 0, 0, 0]
    assert sampler.draw(probabilities) == 0
