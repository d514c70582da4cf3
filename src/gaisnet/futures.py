"""Composition of futures without waiting threads."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_result(source: Future[A], change: Callable[[A], B]) -> Future[B]:
    """Return a future of ``change(result)``; errors of ``change`` or ``source`` pass through.

    ``change`` runs in the thread that fulfils ``source`` and must not wait. Cancelling the result cancels the
    source.
    """
    result: _Dependent[B] = _Dependent(source)
    source.add_done_callback(lambda _: _pass_on(source, change, result))
    return result


def flat_map(source: Future[A], ask: Callable[[A], Future[B]]) -> Future[B]:
    """Return a future of the future ``ask(result)``; errors pass through."""
    result: _Dependent[B] = _Dependent(source)
    source.add_done_callback(lambda _: _pass_on(source, ask, result))
    return result


def afterwards(source: Future[Any], ask: Callable[[], Future[B]]) -> Future[B]:
    """Call ``ask`` once ``source`` has ended in any way. Cancelling the result does not cancel ``source``."""
    ended: Future[None] = Future()
    source.add_done_callback(lambda _: _settle(ended))
    return flat_map(ended, lambda _: ask())


def map_error(source: Future[A], change: Callable[[Exception], Exception]) -> Future[A]:
    """Return the same future with its error replaced by ``change(error)``."""
    result: _Dependent[A] = _Dependent(source)

    def pass_on(_: Future[A]) -> None:
        error = None if source.cancelled() else source.exception()
        if isinstance(error, Exception):
            _settle(result, error=change(error))
        else:
            _pass_on(source, lambda answer: answer, result)

    source.add_done_callback(pass_on)
    return result


def as_future(answer: A | Future[A]) -> Future[A]:
    """Return a future as it is, or one that already has the value."""
    if isinstance(answer, Future):
        return answer
    known: Future[A] = Future()
    known.set_result(answer)
    return known


def aside(work: Callable[[Callable[[], bool]], A]) -> Future[A]:
    """Run work that waits in a thread of its own; return a future of its result.

    ``work`` gets a function that returns whether the future has been cancelled.
    """
    result: Future[A] = Future()

    def run() -> None:
        try:
            answer = work(result.cancelled)
        except Exception as error:  # see ``_pass_on``
            _settle(result, error=error)
        else:
            _settle(result, answer)

    threading.Thread(target=run, name="aside", daemon=True).start()
    return result


def failed(error: Exception) -> Future[Any]:
    """Return a future that has failed."""
    known: Future[Any] = Future()
    known.set_exception(error)
    return known


class _Dependent(Future[B]):
    """A future whose cancellation cancels its source."""

    def __init__(self, source: Future[Any]) -> None:
        super().__init__()
        self.source = source

    def cancel(self) -> bool:
        self.source.cancel()
        return super().cancel()


def _pass_on(source: Future[A], change: Callable[[A], Any], result: _Dependent[Any]) -> None:
    if source.cancelled() or result.cancelled():
        Future.cancel(result)
        result.set_running_or_notify_cancel()
        return
    try:
        changed = change(source.result())
    except Exception as error:  # nobody would notice it in this thread, and the caller would wait forever
        _settle(result, error=error)
        return
    if isinstance(changed, Future):
        result.source = changed
        changed.add_done_callback(lambda _: _pass_on(changed, lambda answer: answer, result))
    else:
        _settle(result, changed)


def _settle(result: Future[B], answer: Any = None, error: Exception | None = None) -> None:
    if not result.set_running_or_notify_cancel():
        return
    if error is not None:
        result.set_exception(error)
    else:
        result.set_result(answer)
