"""Whose turn it is to answer at a site: tiers do one thing at a time, over however many links they are asked."""

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class Worker:
    """Sees to it that a site does one thing after the other, in the order in which they came, in whatever thread."""

    def __init__(self, name: str) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._calls: SimpleQueue[bool] = SimpleQueue()
        self._turn = threading.Lock()
        self._whose_turn = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], object]) -> None:
        """Do it in a thread of its own when everything before it is done."""
        self._waiting.append(task)
        self._calls.put(True)

    def claim(self) -> bool:
        """Whether the calling thread may do a thing itself, at once; it calls ``release`` when that is done."""
        if self._waiting or not self._turn.acquire(blocking=False):
            return False
        if self._closed:
            self._turn.release()
            return False
        self._whose_turn = threading.get_ident()
        return True

    def release(self) -> None:
        """Give back what ``claim`` gave."""
        self._whose_turn = 0
        self._turn.release()

    def close(self, timeout_s: float) -> None:
        """Begin nothing more. What is still under way after ``timeout_s`` is left to itself."""
        self._closed = True
        self._calls.put(False)
        if self._whose_turn != threading.get_ident() and self._turn.acquire(timeout=timeout_s):
            self._turn.release()

    def _work(self) -> None:
        while self._calls.get():
            with self._turn:
                if self._closed:
                    return
                self._whose_turn = threading.get_ident()
                self._waiting[0]()
                self._waiting.popleft()  # not before: while it is there, nobody who comes later gets a turn
                self._whose_turn = 0
