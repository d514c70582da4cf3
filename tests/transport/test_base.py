"""Waiting for an answer: how it ends, and that it always ends."""

from concurrent.futures import Future
from typing import NoReturn

import pytest

from gaisnet.errors import LinkLost, LinkTimeout, UnexpectedMessage
from gaisnet.messages import Done, Installed, Message
from gaisnet.transport.base import wait_for
from tests.clock import Awaited, Clock

LOOK_S = 0.25  # a wait notices what happens a little late


class Other:
    """The other end's presence."""

    def __init__(self, peer: str = "life") -> None:
        self.peer = peer

    def send(self, message: Message) -> NoReturn:
        raise AssertionError("to wait is not to ask again")

    def is_now(self, peer: str) -> None:
        self.peer = peer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    clock.install(monkeypatch, "gaisnet.transport.base")
    return clock


def test_an_answer_is_given_as_soon_as_it_comes(clock: Clock) -> None:
    answer, done = Awaited(clock), Done()
    clock.after(7.0, lambda: answer.settle(done))
    assert wait_for(Other(), answer, Done, "asked", "the peer", deadline_s=60.0, away_s=5.0) is done
    assert clock.now == pytest.approx(7.0, abs=0.01)


def test_an_answer_that_is_there_is_given_even_when_no_time_is_left() -> None:
    answer: Future[Message] = Future()
    answer.set_result(Done())
    assert wait_for(Other(""), answer, Done, "asked", "the peer", deadline_s=0.0, away_s=0.0) == Done()


def test_an_error_comes_through(clock: Clock) -> None:
    answer, error = Awaited(clock), LinkLost("a", "it restarted")
    clock.after(3.0, lambda: answer.settle(error))
    with pytest.raises(LinkLost) as raised:
        wait_for(Other(), answer, Done, "asked", "the peer", deadline_s=60.0, away_s=5.0)
    assert raised.value is error
    assert clock.now == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("seconds", [0.0, 0.1, 0.2, 3.0])
def test_a_timeout_at_the_other_end_is_its_error_and_not_the_end_of_the_wait(clock: Clock, seconds: float) -> None:
    answer, error = Awaited(clock), TimeoutError("a disk at the other end")
    clock.after(seconds, lambda: answer.settle(error))
    with pytest.raises(TimeoutError) as raised:
        wait_for(Other(), answer, Done, "asked", "the peer", deadline_s=60.0, away_s=5.0)
    assert raised.value is error
    assert clock.now == pytest.approx(seconds, abs=0.01)


@pytest.mark.parametrize("deadline_s", [0.0, 0.1, 20.0])
def test_after_the_deadline_nobody_waits_and_a_late_answer_is_dropped(clock: Clock, deadline_s: float) -> None:
    answer = Awaited(clock)
    with pytest.raises(
        LinkTimeout,
        match=rf"who, what, waiting for a Done of the peer: no answer for {deadline_s:.0f} s; look at the log",
    ):
        wait_for(Other(), answer, Done, "who, what", "the peer", deadline_s, away_s=5.0)
    assert deadline_s <= clock.now <= deadline_s + LOOK_S
    assert answer.cancelled() and not answer.set_running_or_notify_cancel()


def test_an_end_that_is_away_is_waited_for_less_long(clock: Clock) -> None:
    answer, other = Awaited(clock), Other()
    clock.after(10.0, lambda: other.is_now(""))
    with pytest.raises(LinkTimeout, match=r"who, what, waiting for a Done of the peer: away for 5 s; look at the log"):
        wait_for(other, answer, Done, "who, what", "the peer", deadline_s=60.0, away_s=5.0)
    assert 15.0 - LOOK_S <= clock.now <= 15.0 + LOOK_S
    assert answer.cancelled()


def test_an_end_that_was_away_from_the_start(clock: Clock) -> None:
    with pytest.raises(LinkTimeout, match="away for 5 s"):
        wait_for(Other(""), Awaited(clock), Done, "asked", "the peer", deadline_s=60.0, away_s=5.0)
    assert 5.0 <= clock.now <= 5.0 + LOOK_S


def test_short_absences_are_not_added_up_but_the_deadline_holds(clock: Clock) -> None:
    answer, other = Awaited(clock), Other()
    for second in range(0, 60, 4):  # away for 3 s out of 4
        clock.after(second + 1.0, lambda: other.is_now(""))
        clock.after(second + 4.0, lambda: other.is_now("life"))
    with pytest.raises(LinkTimeout):
        wait_for(other, answer, Done, "asked", "the peer", deadline_s=30.0, away_s=5.0)
    assert 30.0 <= clock.now <= 30.0 + LOOK_S


def test_the_deadline_holds_while_the_other_end_is_away(clock: Clock) -> None:
    with pytest.raises(LinkTimeout, match="away for 2 s"):
        wait_for(Other(""), Awaited(clock), Done, "asked", "the peer", deadline_s=2.0, away_s=50.0)
    assert 2.0 <= clock.now <= 2.0 + LOOK_S


def test_one_that_comes_back_in_time_answers(clock: Clock) -> None:
    answer, other = Awaited(clock), Other("")
    clock.after(4.0, lambda: other.is_now("life"))
    clock.after(9.0, lambda: answer.settle(Done()))
    assert wait_for(other, answer, Done, "asked", "the peer", deadline_s=60.0, away_s=5.0) == Done()


def test_a_reply_of_another_kind_is_an_error_that_names_both() -> None:
    answer: Future[Message] = Future()
    answer.set_result(Done())
    with pytest.raises(UnexpectedMessage, match="an edge, waiting for a Installed, does not take a Done here"):
        wait_for(Other(), answer, Installed, "an edge", "the peer", deadline_s=60.0, away_s=5.0)
