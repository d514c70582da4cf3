"""Calls of many threads run together, each gets its own answer, and only a culprit fails."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
from torch import Tensor

from gaisnet.errors import LinkTimeout
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.generation import decoding
from gaisnet.serving.generation.batching_call import BatchingCall
from gaisnet.serving.generation.decoding import DeviceParts, generate
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import generated, lively_model, prompt, served, session

pytestmark = pytest.mark.numeric

T = TypeVar("T")


class Held:
    """Squares numbers; the first batch waits until it is let go."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Event()
        self.let_go = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        if not self.entered.is_set():
            self.entered.set()
            assert self.let_go.wait(60)
        if 13 in numbers:
            raise ValueError("unlucky")
        return [number * number for number in numbers]


def all_behind_one(held: Held, combined: BatchingCall[int, int], numbers: Sequence[int]) -> dict[int, "Future[int]"]:
    """Calls of as many threads that all wait while the first of them runs."""
    pool = ThreadPoolExecutor(len(numbers))
    calls = {numbers[0]: pool.submit(combined, numbers[0])}
    assert held.entered.wait(60)
    for number in numbers[1:]:
        calls[number] = pool.submit(combined, number)
    until(lambda: len(combined._queue) == len(numbers) - 1)
    held.let_go.set()
    pool.shutdown()
    return calls


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_who_waits_runs_together() -> None:
    held = Held()
    calls = all_behind_one(held, BatchingCall(held, lambda number: 1, most=100), range(1, 9))
    assert {number: call.result() for number, call in calls.items()} == {n: n * n for n in range(1, 9)}
    assert [len(batch) for batch in held.batches] == [1, 7]


def test_a_batch_has_its_limit_and_one_question_may_be_beyond_it() -> None:
    held = Held()
    calls = all_behind_one(held, BatchingCall(held, lambda number: number, most=9), [1, 4, 5, 50, 6])
    assert all(call.result() == number**2 for number, call in calls.items())
    assert all(sum(batch) <= 9 or len(batch) == 1 for batch in held.batches)
    assert sorted(number for batch in held.batches for number in batch) == [1, 4, 5, 6, 50]


def test_only_the_culprit_fails() -> None:
    held = Held()
    calls = all_behind_one(held, BatchingCall(held, lambda number: 1, most=100), [1, 2, 13, 3])
    assert [calls[number].result() for number in (1, 2, 3)] == [1, 4, 9]
    with pytest.raises(ValueError, match="unlucky"):
        calls[13].result()


def test_questions_that_are_made_together_run_together() -> None:
    held = Held()
    held.entered.set()
    combined = BatchingCall(held, lambda number: 1, most=100)
    before: list[Future[int]] = [Future() for _ in range(8)]
    with ThreadPoolExecutor(9) as pool:
        calls = [pool.submit(combined.after, future, lambda number: number + 1) for future in before]
        until(lambda: all(vars(future)["_done_callbacks"] for future in before))
        broken: Future[int] = Future()
        failing = pool.submit(combined.after, broken, lambda number: number)
        broken.set_exception(KeyError("lost"))
        for number, future in enumerate(before):
            future.set_result(number)
        assert [call.result() for call in calls] == [n * n for n in range(1, 9)]
        with pytest.raises(KeyError, match="lost"):
            failing.result()


def test_what_does_not_come_is_not_waited_for_for_ever() -> None:
    combined: BatchingCall[int, list[int]] = BatchingCall(
        lambda numbers: [[number] for number in numbers], lambda n: 1, 9
    )
    with pytest.raises(CancelledError):
        combined.after(Future[int](), lambda number: number, deadline_s=0.01)
    assert combined(4) == [4]  # nothing is left of it


class Silent:
    """A session at the far end of a link that says nothing any more."""

    deadline_s = 0.01

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        return Future()

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        raise NotImplementedError

    def crop(self, length: int) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to free."""


def test_a_body_that_says_nothing_has_a_deadline() -> None:
    parts, _ = served(lively_model(), CutLayers(1))
    with pytest.raises(LinkTimeout, match="waiting for output rows: none for 0.01 s"):
        list(generate(parts, Silent(), prompt(3), Sampling(max_tokens=4)))


@pytest.mark.parametrize("cut", [CutLayers(0, 0), CutLayers(2, 1)], ids=str)
def test_answers_at_once_are_those_of_each_alone(cut: CutLayers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", 3)
    model = lively_model()
    parts, service = served(model, cut)
    runs = counting(parts)
    with service.serving(), ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: answer(parts, service, i), range(8)))
    assert answers == [generated(model, prompt(4 + i, seed=i), 12) for i in range(8)]
    assert sum(runs) > len(runs)  # some ran together


def answer(parts: DeviceParts, service: BodyService, number: int) -> list[int]:
    sampling = Sampling(max_tokens=12)
    return list(generate(parts, session(parts, service), prompt(4 + number, seed=number), sampling))


def counting(parts: DeviceParts) -> list[int]:
    """How many answers went through the tail together, run by run."""
    runs: list[int] = []
    finish_all = parts._finish._run

    def counted(every: Sequence[T]) -> Sequence[T]:
        runs.append(len(every))
        return finish_all(every)  # type: ignore[arg-type, return-value]

    parts._finish._run = counted  # type: ignore[assignment]
    return runs
