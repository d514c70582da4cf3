"""The domain model writes until it is not sure; from there on the answer is the foundation model's."""

import math

import pytest
import torch

from gaisnet.errors import SessionRefused
from gaisnet.serving.generation.decoding import DeviceParts, generate
from gaisnet.serving.generation.routing import (
    MEASURES,
    Routing,
    Target,
    Trace,
    generate_routed,
    margin,
    negative_entropy,
    top_probability,
)
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import prompt
from tests.serving.servers import LocalBodies, shared_bodies

TOKENS = 16
GREEDY = Sampling(max_tokens=TOKENS)
DM = Target("edge", ("relay", "domain"), "shapes")
FM = Target("cloud", ("shapes",), "shapes")


def routed(
    parts: DeviceParts, bodies: LocalBodies, routing: Routing, sampling: Sampling = GREEDY, target: Target = DM
) -> tuple[list[int], Trace]:
    trace = Trace()
    session = bodies.open_escalating_session(target, parts.first, parts.stop, 64)
    written = list(generate_routed(parts, session, prompt(7), sampling, routing, trace))
    assert bodies.num_sessions == 0
    return written, trace


def alone(parts: DeviceParts, bodies: LocalBodies, target: Target, ids: list[int], num: int = TOKENS) -> list[int]:
    session = bodies.open_session(target, parts.first, parts.stop, 64)
    return list(generate(parts, session, ids, Sampling(max_tokens=num)))


def test_never_and_always() -> None:
    parts, bodies = shared_bodies()
    by_domain, trace = routed(parts, bodies, Routing(("shapes",), "never", threshold=1.0))
    assert by_domain == alone(parts, bodies, DM, prompt(7))
    assert (trace.bodies, trace.escalated_at, len(trace.confidences)) == (["edge"] * TOKENS, None, TOKENS)
    by_foundation, trace = routed(parts, bodies, Routing(("shapes",), "always"))
    assert by_foundation == alone(parts, bodies, FM, prompt(7))
    assert (trace.bodies, trace.escalated_at, len(trace.confidences)) == (["cloud"] * TOKENS, 0, 1)
    assert by_domain != by_foundation


@pytest.mark.parametrize("tail_layers", [0, 1])
@pytest.mark.parametrize("behind", [1, 5])
def test_the_foundation_model_takes_over_a_beginning(tail_layers: int, behind: int) -> None:
    parts, bodies = shared_bodies(tail_layers=tail_layers)
    dm, fm = (Target("edge", (), "shapes"), Target("cloud", (), "shapes")) if tail_layers else (DM, FM)
    by_domain, before = routed(parts, bodies, Routing(fm.adapters, "never"), target=dm)
    threshold = min(before.confidences[behind:]) + 1e-6
    at = next(i for i, confidence in enumerate(before.confidences) if confidence < threshold)
    written, trace = routed(parts, bodies, Routing(fm.adapters, threshold=threshold), target=dm)
    assert trace.escalated_at == at
    assert trace.bodies == ["edge"] * at + ["cloud"] * (TOKENS - at)
    assert written[:at] == by_domain[:at]
    assert written[at:] == alone(parts, bodies, fm, prompt(7) + written[:at], TOKENS - at)


def test_a_cloud_that_is_away_is_asked_once() -> None:
    parts, bodies = shared_bodies()
    bodies.cloud_away = True
    written, trace = routed(parts, bodies, Routing(("shapes",), "always"))
    assert written == alone(parts, bodies, DM, prompt(7))
    assert (trace.escalated_at, trace.bodies) == (None, ["edge"] * TOKENS)
    assert "is lost: it is away" in str(trace.refusal)


def test_a_seed_decides_what_is_drawn() -> None:
    parts, bodies = shared_bodies()

    def drawn(seed: int) -> list[int]:
        return routed(parts, bodies, Routing(("shapes",), threshold=0.3), Sampling(TOKENS, 1.0, seed=seed))[0]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_a_stop_token_ends_it() -> None:
    parts, bodies = shared_bodies()
    written, _ = routed(parts, bodies, Routing((), "never"))
    stops = Sampling(TOKENS, stop_ids=frozenset(written[3:4]))
    assert routed(parts, bodies, Routing((), "never"), stops)[0] == written[: written.index(written[3]) + 1]


def test_measures() -> None:
    logits_V = torch.tensor([0.5, 0.25, 0.125, 0.125]).log() + 3
    assert top_probability(logits_V) == pytest.approx(0.5)
    assert margin(logits_V) == pytest.approx(0.25)
    assert negative_entropy(logits_V) == pytest.approx(-1.75 * math.log(2))
    sure_V = torch.tensor([200.0, 0.0, 0.0])
    assert [measure(sure_V) for measure in MEASURES.values()] == pytest.approx([1, 1, 0])
    with pytest.raises(SessionRefused, match="'guess': it is not known; use margin"):
        Routing((), measure="guess")
