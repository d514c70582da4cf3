"""A site's worker: its tiers answer one request at a time, over all links.

Askers take turns, so that one with many requests delays another by at most one of them.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from queue import SimpleQueue


class Worker:
    """Runs a site's tasks one after the other, in any thread.

    Tasks of one asker run in order; askers with waiting tasks take turns.
    """

    def __init__(self, name: str) -> None:
        self._waiting: OrderedDict[str, deque[Callable[[], object]]] = OrderedDict()  # the next asker comes first
        self._left = 0  # unfinished tasks
        self._lock = threading.Lock()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._compute_lock = threading.Lock()
        self._whose_turn = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], object], asker: str = "") -> None:
        """Run a task in a thread of its own, when it is ``asker``'s turn and its earlier tasks are done."""
        with self._lock:
            self._waiting.setdefault(asker, deque()).append(task)
            self._left += 1
        self._calls.put(True)

    def claim(self) -> bool:
        """Return whether the calling thread may run a task itself, at once; it calls ``release`` afterwards."""
        if self._left or not self._compute_lock.acquire(blocking=False):
            return False
        if self._closed:
            self._compute_lock.release()
            return False
        self._whose_turn = threading.get_ident()
        return True

    def release(self) -> None:
        """Release the result of ``claim``."""
        self._whose_turn = 0
        self._compute_lock.release()

    def close(self, timeout_s: float) -> None:
        """Start nothing more. Tasks still running after ``timeout_s`` are left alone."""
        self._closed = True
        self._calls.put(False)
        if self._whose_turn != threading.get_ident() and self._compute_lock.acquire(timeout=timeout_s):
            self._compute_lock.release()

    def _work(self) -> None:
        while self._calls.get():
            with self._compute_lock:
                if self._closed:
                    return
                self._whose_turn = threading.get_ident()
                self._next()()
                with self._lock:
                    self._left -= 1  # not before: while it counts, nobody who comes later gets a turn
                self._whose_turn = 0

    def _next(self) -> Callable[[], object]:
        with self._lock:
            asker, tasks = self._waiting.popitem(last=False)
            task = tasks.popleft()
            if tasks:
                self._waiting[asker] = tasks
            return task
