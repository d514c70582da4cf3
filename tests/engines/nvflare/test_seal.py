import logging
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaisnet.engines.nvflare.exchange import REFUSED, TOPIC_ANSWER, TOPIC_REQUEST, Fields
from gaisnet.engines.nvflare.seal import Guard, Seal, SealedPost

SECRET = bytes(range(32))
REQUEST: Fields = {"id": "1", "payload": b"train"}
ANY_FIELDS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "seal"), st.binary(max_size=64) | st.text(max_size=64), max_size=4
)


def seal(secret: bytes = SECRET, edge: str = "edge1", job: str = "job") -> Seal:
    return Seal(secret, edge, job)


def guard(taken: list[Mapping[str, object]]) -> Guard:
    def take(fields: Mapping[str, object]) -> Fields:
        taken.append(fields)
        return {"ok": "yes"}

    return Guard(TOPIC_REQUEST, take, seal())


@given(st.text(max_size=8), ANY_FIELDS)
def test_what_was_sealed_is_accepted(topic: str, fields: Fields) -> None:
    sealed = seal().put_on(topic, fields)
    assert seal().is_on(topic, sealed)
    assert {name: value for name, value in sealed.items() if name != "seal"} == fields


@given(ANY_FIELDS, ANY_FIELDS)
@settings(max_examples=300)
def test_no_two_messages_have_the_same_seal(one: Fields, other: Fields) -> None:
    mark = seal().put_on("topic", one)["seal"]
    assert seal().is_on("topic", {**other, "seal": mark}) == (one == other)


@pytest.mark.parametrize(
    "foreign", [seal(secret=bytes(32)), seal(secret=b""), seal(edge="edge2"), seal(job="an earlier job")]
)
def test_a_seal_of_somebody_else_or_of_another_job_is_none(foreign: Seal) -> None:
    assert not seal().is_on(TOPIC_REQUEST, foreign.put_on(TOPIC_REQUEST, REQUEST))


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b"trait"},
        {"payload": "train"},
        {"id": "2"},
        {"more": b""},
        {"seal": b""},
        {"seal": "text"},
        {"seal": None},
        {"payload": 1},
        {"payload": None},
        {3: b""},
    ],
)
def test_a_changed_message_is_not_sealed(change: dict[str, object]) -> None:
    assert not seal().is_on(TOPIC_REQUEST, {**seal().put_on(TOPIC_REQUEST, REQUEST), **change})


def test_pieces_do_not_slide_from_one_field_into_the_next() -> None:
    mark = seal().put_on("topic", {"a": b"bc"})["seal"]
    for fields in ({"ab": b"c"}, {"a": b"b", "c": b""}, {"a": b"", "b": b"c"}, {"a": "bc"}):
        assert not seal().is_on("topic", {**fields, "seal": mark})


def test_a_request_is_no_answer() -> None:
    assert not seal().is_on(TOPIC_ANSWER, seal().put_on(TOPIC_REQUEST, REQUEST))


def test_a_forged_message_is_dropped_and_the_next_right_one_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[Mapping[str, object]] = []
    guarded = guard(taken)
    forged = seal(secret=b"guessed").put_on(TOPIC_REQUEST, {"id": "1\nforged line", "payload": b"burn"})
    with caplog.at_level(logging.DEBUG):
        assert guarded(forged) == REFUSED
        assert guarded(dict(REQUEST)) == REFUSED
        assert guarded({}) == REFUSED
        assert taken == []
        assert guarded(seal().put_on(TOPIC_REQUEST, REQUEST)) == {"ok": "yes"}
    assert [fields["payload"] for fields in taken] == [b"train"]
    # One line for all of them, and nothing in it that the sender chose or that must not be known.
    assert caplog.messages == [
        "dropped a gaisnet.request without the right seal: forged, or from a kit of another making"
    ]


def test_a_warning_comes_once_a_minute(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now = 1000.0
    monkeypatch.setattr("gaisnet.engines.nvflare.seal.time.monotonic", lambda: now)
    guarded = guard([])
    for _ in range(130):
        guarded({})
        now += 1
    assert len(caplog.messages) == 3


def test_a_post_seals_what_it_sends() -> None:
    sent: list[tuple[str, Fields, float]] = []

    def post(topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        sent.append((topic, fields, timeout_s))
        return {"ok": "no"}

    assert SealedPost(post, seal())(TOPIC_REQUEST, REQUEST, 2.5) == {"ok": "no"}
    ((topic, fields, timeout_s),) = sent
    assert (topic, timeout_s) == (TOPIC_REQUEST, 2.5)
    assert seal().is_on(topic, fields)
    assert "seal" not in REQUEST


def test_the_secret_is_not_shown() -> None:
    shown = f"{seal()!r} {seal()} {seal().put_on(TOPIC_REQUEST, REQUEST)}"
    assert repr(SECRET)[2:-1] not in shown
    assert SECRET.hex() not in shown
