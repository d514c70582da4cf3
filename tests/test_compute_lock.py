"""Whose turn it is: decided by who waits and by time, and time is a number that the test sets."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from gaisnet.compute_lock import ComputeLock, FairShare, PartitionedCores


class Hands:
    """Threads that take a turn, do something while they have it, and give it back when told."""

    def __init__(self, compute_lock: ComputeLock) -> None:
        self.compute_lock = compute_lock
        self.order: list[str] = []
        self._threads: list[threading.Thread] = []

    def begin(self, name: str, take: Callable[[], AbstractContextManager[None]]) -> threading.Event:
        """Someone queues up; returns what lets him go when he has had his turn."""
        go, before = threading.Event(), self._num_waiting()

        def work() -> None:
            with take():
                self.order.append(name)
                assert go.wait(30)

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
        until(lambda: self._num_waiting() > before or name in self.order)
        return go

    def end(self) -> list[str]:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.order

    def _num_waiting(self) -> int:
        return sum(map(len, self.compute_lock._queues.values()))


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came to be")


@pytest.fixture
def now() -> Iterator[list[float]]:
    yield [0.0]


def queue_up(share: float, now: list[float], waited_s: float) -> list[str]:
    """Two who learn and two who serve queue up behind one who serves for some time; the order in which they run."""
    compute_lock = ComputeLock(share, lambda: now[0])
    hands = Hands(compute_lock)
    first = hands.begin("first", compute_lock.serving)
    others = [hands.begin(f"learn {i}", compute_lock.learning) for i in range(2)]
    others += [hands.begin(f"serve {i}", compute_lock.serving) for i in range(2)]
    now[0] += waited_s
    for go in (*others, first):
        go.set()
    return hands.end()


def test_answers_go_first_and_nobody_overtakes_his_like(now: list[float]) -> None:
    assert queue_up(0.5, now, 0.0) == ["first", "serve 0", "serve 1", "learn 0", "learn 1"]


def test_learning_goes_first_when_it_is_owed_time(now: list[float]) -> None:
    assert queue_up(0.5, now, 0.4) == ["first", "learn 0", "learn 1", "serve 0", "serve 1"]


def test_with_a_share_of_nothing_it_never_does(now: list[float]) -> None:
    assert queue_up(0.0, now, 0.4) == ["first", "serve 0", "serve 1", "learn 0", "learn 1"]


def test_a_pause_lets_those_who_serve_go_before_all_who_learn(now: list[float]) -> None:
    compute_lock = ComputeLock(0.5, lambda: now[0])
    hands = Hands(compute_lock)
    with compute_lock.learning():
        go = [hands.begin("serve", compute_lock.serving), hands.begin("learn", compute_lock.learning)]
        for event in go:
            event.set()
        compute_lock.pause()
        assert hands.order == ["serve"]
        compute_lock.pause()
        assert hands.order == ["serve"]
    assert hands.end() == ["serve", "learn"]


def test_a_pause_keeps_the_turn_while_learning_is_owed_time(now: list[float]) -> None:
    compute_lock = ComputeLock(0.5, lambda: now[0])
    hands = Hands(compute_lock)
    first = hands.begin("first", compute_lock.serving)
    learned = threading.Event()

    def learn() -> None:
        with compute_lock.learning():  # 0.2 s of waiting, of which half is owed
            now[0] += 0.15
            compute_lock.pause()
            hands.order.append("learned")
            now[0] += 0.06
            compute_lock.pause()
            learned.set()

    thread = threading.Thread(target=learn, daemon=True)
    thread.start()
    until(lambda: hands._num_waiting() == 1)
    second = hands.begin("second", compute_lock.serving)
    now[0] += 0.2
    second.set()
    first.set()
    assert learned.wait(30)
    assert hands.end() == ["first", "learned", "second"]


def test_who_has_the_turn_may_take_it_again(now: list[float]) -> None:
    compute_lock = ComputeLock(0.5, lambda: now[0])
    hands = Hands(compute_lock)
    with compute_lock.learning(), compute_lock.serving(), compute_lock.learning():
        go = hands.begin("serve", compute_lock.serving)
        go.set()
        compute_lock.pause()  # the whole of it is given away, and comes back
        assert hands.end() == ["serve"]
    with compute_lock.serving():
        pass


def test_a_pause_of_someone_else_does_nothing(now: list[float]) -> None:
    compute_lock = ComputeLock(0.5, lambda: now[0])
    compute_lock.pause()
    hands = Hands(compute_lock)
    go = hands.begin("learn", compute_lock.learning)
    compute_lock.pause()
    go.set()
    with compute_lock.serving():
        compute_lock.pause()
    hands.end()


def test_an_error_gives_the_turn_back(now: list[float]) -> None:
    compute_lock = ComputeLock()
    with pytest.raises(KeyError), compute_lock.learning():
        raise KeyError
    hands = Hands(compute_lock)
    hands.begin("next", compute_lock.serving).set()
    assert hands.end() == ["next"]


def test_many_who_come_and_go_are_never_there_together() -> None:
    compute_lock, inside, most = ComputeLock(), [0], [0]

    def work(serves: bool) -> None:
        for _ in range(100):
            with compute_lock.serving() if serves else compute_lock.learning():
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1
                compute_lock.pause()

    threads = [threading.Thread(target=work, args=(i % 2 == 0,), daemon=True) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == [1]


def side_by_side(share: float, cores: int, now: list[float]) -> tuple[PartitionedCores, list[int]]:
    """A machine, and the cores that threads were told to use."""
    limits: list[int] = []
    return PartitionedCores(share, cores, limits.append, lambda: now[0]), limits


def test_with_several_cores_answers_and_learning_are_there_together(now: list[float]) -> None:
    compute_lock, _ = side_by_side(0.5, 4, now)
    hands = Hands(compute_lock)
    hands.compute_lock = compute_lock._lanes["serving"]  # whose queue is watched
    with compute_lock.learning():
        first = hands.begin("serve", compute_lock.serving)
        until(lambda: hands.order == ["serve"])
        second = hands.begin("serve too", compute_lock.serving)
        compute_lock.pause()
        assert hands.order == ["serve"]  # answers one after another
        first.set()
        second.set()
        assert hands.end() == ["serve", "serve too"]
        with compute_lock.serving():  # as when a new version is put beside the others
            pass


@pytest.mark.parametrize(
    ("share", "cores", "learns", "serves"),
    [(0.5, 2, 1, 1), (0.25, 8, 2, 6), (0.0, 4, 1, 3), (1.0, 4, 3, 1), (0.5, 5, 2, 3)],
)
def test_each_has_its_cores_while_the_other_is_there(
    share: float, cores: int, learns: int, serves: int, now: list[float]
) -> None:
    compute_lock, limits = side_by_side(share, cores, now)
    for pass_s, take, expected in (
        (0.0, compute_lock.learning, cores),
        (0.5, compute_lock.serving, serves),
        (0.5, compute_lock.learning, learns),
        (1.5, compute_lock.learning, cores),
        (1.0, compute_lock.serving, cores),
    ):
        now[0] += pass_s
        with take():
            assert limits[-1] == expected
    assert len(limits) <= 5
    with compute_lock.learning():
        now[0] += 30.0
        with compute_lock.serving():
            assert limits[-1] == serves  # it has had no end yet


def steady_load(share: float, piece_s: float, step_s: float, between_s: float, until_s: float = 60.0) -> float:
    """The share of time that learning has beside one answer whose rows come ``between_s`` after each step."""
    ration, now, learned_s, arrives_s = FairShare(share), 0.0, 0.0, 0.0
    while now < until_s:
        serves = now >= arrives_s and not ration.owed
        passed = step_s if serves else piece_s
        ration.passed(passed, learning=not serves)
        now += passed
        if serves:
            arrives_s = now + between_s
        else:
            learned_s += passed
    return learned_s / now


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8])
def test_where_answers_would_take_it_all_learning_has_its_share(share: float) -> None:
    assert steady_load(share, piece_s=0.01, step_s=0.05, between_s=0.0) == pytest.approx(share, abs=0.02)


def test_idle_time_counts() -> None:
    """Answers leave two thirds: each is behind by no more than a piece of learning."""
    assert steady_load(0.5, piece_s=0.01, step_s=0.05, between_s=0.1) == pytest.approx(2 / 3, abs=0.03)


def test_what_is_long_past_does_not_matter() -> None:
    ration = FairShare(0.5, memory_s=1.0)
    ration.passed(3600.0, learning=True)
    ration.passed(2.0, learning=False)
    assert not ration.owed
    ration.passed(0.1, learning=False)
    assert ration.owed
    ration.passed(3600.0, learning=False)
    ration.passed(2.1, learning=True)
    assert not ration.owed
