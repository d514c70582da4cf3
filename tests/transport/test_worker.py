"""Whose turn it is to answer at a site."""

import threading

from gaisnet.transport.worker import Worker

DEADLINE_S = 30.0


def test_a_thread_that_claims_the_turn_keeps_others_from_it_until_it_gives_it_back() -> None:
    worker, done = Worker("answers"), threading.Event()
    assert worker.claim()
    assert not worker.claim()
    worker.submit(done.set)
    assert not done.is_set()
    worker.release()
    assert done.wait(DEADLINE_S)
    worker.close(DEADLINE_S)


def test_nobody_overtakes_what_waits() -> None:
    worker, begun, go_on, done = Worker("answers"), threading.Event(), threading.Event(), threading.Event()
    seen: list[int] = []

    def first() -> None:
        begun.set()
        assert go_on.wait(DEADLINE_S)
        seen.append(1)

    def second() -> None:
        seen.append(2)
        done.set()

    worker.submit(first)
    worker.submit(second)
    assert begun.wait(DEADLINE_S) and not worker.claim()
    go_on.set()
    assert done.wait(DEADLINE_S) and seen == [1, 2]
    worker.close(DEADLINE_S)


def test_askers_take_turns() -> None:
    worker, go_on, done = Worker("answers"), threading.Event(), threading.Event()
    seen: list[str] = []
    worker.submit(lambda: go_on.wait(DEADLINE_S))
    for number in range(4):
        worker.submit(lambda number=number: seen.append(f"greedy {number}"), "greedy")  # type: ignore[misc]
    for name in ("clinic", "ward"):
        worker.submit(lambda name=name: seen.append(name), name)  # type: ignore[misc]
    worker.submit(done.set, "greedy")  # after all others
    go_on.set()
    assert done.wait(DEADLINE_S)
    worker.close(DEADLINE_S)
    assert seen == ["greedy 0", "clinic", "ward", "greedy 1", "greedy 2", "greedy 3"]


def test_nothing_begins_after_the_end() -> None:
    worker, done = Worker("answers"), threading.Event()
    assert worker.claim()
    worker.submit(done.set)
    worker.close(DEADLINE_S)  # by the thread whose turn it is: it does not wait for itself
    worker.release()
    assert not worker.claim()
    worker._thread.join(DEADLINE_S)
    assert not worker._thread.is_alive() and not done.is_set()
