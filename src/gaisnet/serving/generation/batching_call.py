"""Batched calls from many threads: a caller that finds nobody running runs all waiting calls, the others' too.

Flat combining (Hendler et al., SPAA 2010). There is no timer and no thread: a single caller runs at once.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

Q = TypeVar("Q")
A = TypeVar("A")
T = TypeVar("T")


@dataclass
class _PendingCall(Generic[Q, A]):
    """A call and its outcome."""

    question: Q | None = None
    woken: threading.Event = field(default_factory=threading.Event)  # it has an outcome, or must run the waiting calls
    outcome: A | BaseException | None = None
    done: bool = False

    def finish(self, outcome: A | BaseException) -> None:
        self.outcome, self.done = outcome, True
        self.woken.set()

    def result(self) -> A:
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return cast(A, self.outcome)


class BatchingCall(Generic[Q, A]):
    """A function of one question that runs as a function of many.

    Args:
        run: Answers a list of questions, in order. Never called twice at once.
        size: Size of a question.
        most: Most size of a batch, unless it is a single question.
    """

    def __init__(self, run: Callable[[Sequence[Q]], Sequence[A]], size: Callable[[Q], int], most: int) -> None:
        self._run = run
        self._size = size
        self._most = most
        self._lock = threading.Lock()  # held for moments
        self._queue: deque[_PendingCall[Q, A]] = deque()
        self._led = False

    def __call__(self, question: Q) -> A:
        """Return the answer to ``question``; raise its error from ``run``, without disturbing others."""
        mine: _PendingCall[Q, A] = _PendingCall()
        self._join(mine, question)
        return self._wait(mine)

    def after(self, before: "Future[T]", question: Callable[[T], Q], deadline_s: float | None = None) -> A:
        """Ask a question made from the result of ``before``; raise its error, if any.

        The thread that fulfils ``before`` asks it, so that of many fulfilled together none runs
        alone because its thread woke first.

        Args:
            before: Future of the question's input.
            question: Makes the question.
            deadline_s: Seconds after which ``before`` is cancelled, and ``CancelledError`` raised.
        """
        mine: _PendingCall[Q, A] = _PendingCall()

        def join(done: "Future[T]") -> None:
            try:
                self._join(mine, question(done.result()))
            except Exception as error:
                mine.finish(error)

        before.add_done_callback(join)
        if not mine.woken.wait(deadline_s):
            before.cancel()  # unless it has come by now
        return self._wait(mine)

    def _join(self, mine: _PendingCall[Q, A], question: Q) -> None:
        mine.question = question
        with self._lock:
            self._queue.append(mine)
            leads, self._led = not self._led, True
        if leads:
            mine.woken.set()

    def _wait(self, mine: _PendingCall[Q, A]) -> A:
        mine.woken.wait()
        if not mine.done:
            self._lead()
        return mine.result()

    def _lead(self) -> None:
        """Run waiting calls, the longest waiting first, and leave the rest to the next leader."""
        self._let_others_come()
        batch = self._take()
        outcomes = self._outcomes([cast(Q, waiting.question) for waiting in batch])
        for waiting, outcome in zip(batch, outcomes, strict=True):
            waiting.finish(outcome)
        with self._lock:
            self._led = bool(self._queue)
            if self._queue:
                self._queue[0].woken.set()

    def _let_others_come(self) -> None:
        """Let threads that were woken together add their calls first."""
        seen = -1
        while seen < len(self._queue):
            seen = len(self._queue)
            time.sleep(0)

    def _take(self) -> list[_PendingCall[Q, A]]:
        with self._lock:
            batch, left = [self._queue.popleft()], self._most
            left -= self._size(cast(Q, batch[0].question))
            while self._queue and (left := left - self._size(cast(Q, self._queue[0].question))) >= 0:
                batch.append(self._queue.popleft())
            return batch

    def _outcomes(self, questions: Sequence[Q]) -> Sequence[A | BaseException]:
        """Return outcomes; if the batch fails, each call runs alone, so that only the culprit fails."""
        try:
            return self._run(questions)
        except Exception as error:
            if len(questions) == 1:
                return [error]
            return [outcome for question in questions for outcome in self._outcomes([question])]
        except BaseException as error:  # the program ends
            return [error] * len(questions)
