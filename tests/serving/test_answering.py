"""A model's name decides which bodies write, and an answer says how it went."""

from typing import Any

import pytest

from gaisnet.errors import ContextFull, LinkLost, SessionRefused, UnknownAdapter, UnknownModel
from gaisnet.serving.generation.answering import Answer, Answering, Domain, GenerationRequest
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.routing import Routing, Target
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import prompt
from tests.serving.servers import LocalBodies, chat_tokenizer, shared_bodies

TOKENS = 12
IDS = tuple(prompt(7))
DM, DM_OF_TASTES = Target("edge", ("relay", "domain"), "shapes"), Target("edge", ("relay", "domain"), "tastes")
FM, MERGED, WITH_SHAPES, WITH_TASTES = (
    Target("cloud", adapters, "shapes") for adapters in ((), ("merged",), ("shapes",), ("tastes",))
)


def tiny_answering(
    policy: Any = "never", threshold: float = 0.0, speculate: bool = False
) -> tuple[Answering, LocalBodies]:
    parts, bodies = shared_bodies()
    domains = {name: Domain(Routing((name,), policy, threshold)) for name in bodies.edges}
    return Answering(parts, chat_tokenizer(), bodies, domains, "shapes", speculate), bodies


def ask(model: str, **changes: Any) -> GenerationRequest:
    return GenerationRequest(**{"model": model, "prompt": IDS, "sampling": Sampling(max_tokens=TOKENS), **changes})


def text_by(answering: Answering, bodies: LocalBodies, target: Target) -> str:
    """What a body writes by itself."""
    session = bodies.open_session(target, answering._parts.first, answering._parts.stop, 0)
    ids = list(generate(answering._parts, session, IDS, Sampling(max_tokens=TOKENS)))
    return str(answering.tokenizer.decode(ids, skip_special_tokens=True))


def finished(answering: Answering, wanted: GenerationRequest) -> tuple[str, Answer]:
    answer = answering.begin(wanted)
    return "".join(answer), answer


@pytest.mark.parametrize(
    ("model", "policy", "changes", "target"),
    [
        ("foundation", "never", {}, FM),
        ("merged", "never", {}, MERGED),
        ("shapes", "always", {}, DM),
        ("tastes", "always", {}, DM_OF_TASTES),
        ("auto", "never", {}, DM),
        ("auto", "never", {"domain": "tastes"}, DM_OF_TASTES),
        ("auto", "always", {}, WITH_SHAPES),
        ("auto", "always", {"domain": "tastes"}, WITH_TASTES),
        ("auto", "auto", {"speculate": True}, WITH_SHAPES),
        ("auto", "auto", {"speculate": True, "domain": "tastes"}, WITH_TASTES),
        ("foundation", "never", {"speculate": True}, FM),
        ("merged", "never", {"speculate": True}, MERGED),
    ],
)
def test_who_writes(model: str, policy: str, changes: dict[str, Any], target: Target) -> None:
    answering, bodies = tiny_answering(policy)
    text, answer = finished(answering, ask(model, **changes))
    assert text == text_by(answering, bodies, target)
    course = answer.course
    assert (course.now, course.finish_reason, course.num_tokens) == (target.body, "length", TOKENS)
    assert course.num_prompt_tokens == len(IDS)
    assert (course.tally is not None) == ("speculate" in changes)
    assert bodies.num_sessions == 0


def test_speculation_may_be_the_rule() -> None:
    answering, _ = tiny_answering("auto", speculate=True)
    assert finished(answering, ask("auto"))[1].course.tally is not None
    assert finished(answering, ask("auto", speculate=False))[1].course.tally is None
    assert finished(answering, ask("shapes"))[1].course.tally is None


def test_tokens_are_counted_as_they_come() -> None:
    answering, _ = tiny_answering()
    counted: list[int] = []
    "".join(answering.begin(ask("auto"), lambda: counted.append(1)))
    assert len(counted) == TOKENS


def test_how_it_ends() -> None:
    answering, bodies = tiny_answering()
    session = bodies.open_session(DM, 1, 6, 0)
    ids = list(generate(answering._parts, session, IDS, Sampling(max_tokens=TOKENS)))
    stops = Sampling(max_tokens=TOKENS, stop_ids=frozenset(ids[5:6]))
    _, answer = finished(answering, ask("auto", sampling=stops))
    assert (answer.course.finish_reason, answer.course.num_tokens) == ("stop", ids.index(ids[5]) + 1)
    text, _ = finished(answering, ask("auto"))
    stop = text[2:4]
    cut, answer = finished(answering, ask("auto", stop=(stop,)))
    assert (cut, answer.course.finish_reason) == (text[: text.index(stop)], "stop")


def test_closing_frees_at_once() -> None:
    answering, bodies = tiny_answering("auto")
    answering.begin(ask("auto", speculate=True)).close()  # before it has begun
    assert bodies.num_sessions == 0
    answer = answering.begin(ask("auto"))
    pieces = iter(answer)
    next(pieces)
    assert bodies.num_sessions == 1
    answer.close()
    assert bodies.num_sessions == 0
    assert list(pieces) == []


def test_a_body_that_is_lost() -> None:
    answering, bodies = tiny_answering("never")
    bodies.trouble = "lost", 4
    answer = answering.begin(ask("auto"))
    with pytest.raises(LinkLost):
        list(answer)
    assert bodies.num_sessions == 0
    bodies.trouble, bodies.cloud_away = None, True
    with pytest.raises(LinkLost):
        answering.begin(ask("foundation"))


def test_what_speculation_opened_is_closed_if_the_other_body_cannot_be_had() -> None:
    parts, bodies = shared_bodies()
    unknown = {"shapes": Domain(Routing(("shapes",)), adapters=("relay", "nobody's"))}
    answering = Answering(parts, chat_tokenizer(), bodies, unknown, "shapes")
    with pytest.raises(UnknownAdapter):
        answering.begin(ask("auto", speculate=True))
    assert bodies.num_sessions == 0


@pytest.mark.parametrize(
    ("wanted", "error", "said"),
    [
        (ask("gpt"), UnknownModel, "served are: auto, foundation, merged, shapes, tastes"),
        (ask("auto", domain="smells"), UnknownModel, "served are: shapes, tastes"),
        (ask("shapes", domain="tastes"), SessionRefused, "with 'auto' only"),
        (ask("shapes", speculate=True), SessionRefused, "is the model that drafts"),
        (ask("auto", speculate=True), SessionRefused, "asks the foundation model for nothing"),
        (ask("auto", prompt=()), SessionRefused, "it has no tokens"),
        (ask("auto", prompt=(5,) * 120), ContextFull, "the model takes 128"),
    ],
)
def test_what_cannot_be_answered(wanted: GenerationRequest, error: type[Exception], said: str) -> None:
    answering, bodies = tiny_answering("never")
    with pytest.raises(error, match=said):
        answering.begin(wanted)
    assert (bodies.opened, bodies.num_sessions) == ([], 0)
