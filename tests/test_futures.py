"""Answers that come later: changed, passed on, given up."""

from concurrent.futures import CancelledError, Future

import pytest

from gaisnet.futures import as_future, failed, flat_map, map_error, map_result


def test_an_answer_is_changed_when_it_comes() -> None:
    source: Future[int] = Future()
    result = map_result(source, lambda number: number + 1)
    assert not result.done()
    source.set_result(1)
    assert result.result(timeout=0) == 2


def test_one_that_is_there_is_changed_at_once() -> None:
    assert map_result(as_future(1), str).result(timeout=0) == "1"


def test_a_change_that_takes_longer() -> None:
    source: Future[int] = Future()
    longer: Future[str] = Future()
    result = flat_map(source, lambda _: longer)
    source.set_result(1)
    assert not result.done()
    longer.set_result("there")
    assert result.result(timeout=0) == "there"


def test_what_is_raised_on_the_way_comes_through() -> None:
    later: Future[int] = failed(KeyError("late"))
    for result in (
        map_result(failed(KeyError("first")), str),
        map_result(as_future(0), lambda number: 1 // number),
        flat_map(as_future(0), lambda _: later),
    ):
        with pytest.raises((KeyError, ZeroDivisionError)):
            result.result(timeout=0)


def test_what_is_raised_can_be_put_in_other_words() -> None:
    with pytest.raises(KeyError, match="no 1"):
        map_error(failed(ValueError("1")), lambda error: KeyError(f"no {error}")).result(timeout=0)
    assert map_error(as_future(1), lambda error: error).result(timeout=0) == 1
    source: Future[int] = Future()
    result = map_error(source, lambda error: error)
    assert result.cancel() and source.cancelled()


def test_to_give_up_reaches_what_is_waited_for() -> None:
    first: Future[int] = Future()
    second: Future[int] = Future()
    before, after = map_result(first, str), flat_map(as_future(1), lambda _: second)
    assert before.cancel() and after.cancel()
    assert first.cancelled() and second.cancelled()
    with pytest.raises(CancelledError):
        before.result(timeout=0)


def test_what_was_given_up_and_comes_nevertheless_is_dropped() -> None:
    source: Future[int] = Future()
    assert source.set_running_or_notify_cancel()  # too late to give it up
    changed: list[int] = []
    result = map_result(source, changed.append)
    assert result.cancel()
    source.set_result(1)
    assert result.cancelled() and changed == []


def test_a_source_that_somebody_else_gives_up_leaves_nobody_waiting() -> None:
    source: Future[int] = Future()
    result = map_result(source, str)
    source.cancel()
    with pytest.raises(CancelledError):
        result.result(timeout=0)
