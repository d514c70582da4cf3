"""Fine-tuning that can be held up between two steps, and that counts them."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from gaisnet.errors import LinkTimeout
from gaisnet.network import Network
from gaisnet.progress import Progress

_START_S = 1800.0


class _Enough(BaseException):
    """It has learned what it shall; no ``Exception``, so that nobody takes it for a fault."""


class Learner:
    """Fine-tunes one edge round after the other in a thread of its own; what comes of it is thrown away.

    It is the network's progress, which is how it comes between two steps.

    Args:
        progress: Told what other threads tell.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._may_run = threading.Event()
        self._ended = False
        self._first = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._num_steps = 0

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """See ``Progress``."""
        if threading.current_thread() is not self._thread:
            self._progress(stage, done, total, figures)
            return
        if stage == "fine_tune" and figures:
            self._num_steps += 1
            self._first.set()
        self._may_run.wait()
        if self._ended:
            raise _Enough

    @contextmanager
    def learning(self, network: Network) -> Iterator[None]:
        """Inside, it learns wherever it ``runs``. Begins with its first step. Raises what it fails with."""
        self._may_run.set()
        self._thread = threading.Thread(target=self._learn, args=(network,), name="learning", daemon=True)
        self._thread.start()
        try:
            begun = self._first.wait(_START_S)
            self._may_run.clear()
            if not begun:
                raise LinkTimeout("fine-tuning, to be measured", f"no step for {_START_S:.0f} s")
            if self._error is not None:
                raise self._error
            yield
        finally:
            self._ended = True
            self._may_run.set()
            self._thread.join()
        if self._error is not None:
            raise self._error

    @contextmanager
    def runs(self) -> Iterator["Speed"]:
        """Inside, it learns; afterwards the speed is known."""
        speed, steps, started = Speed(), self._num_steps, time.perf_counter()
        self._may_run.set()
        try:
            yield speed
        finally:
            self._may_run.clear()
            speed.steps_per_s = (self._num_steps - steps) / (time.perf_counter() - started)

    def _learn(self, network: Any) -> None:
        try:
            while True:
                network.fine_tune()
                network.cycle += 1  # an order that was carried out would not be carried out again
        except _Enough:
            return
        except BaseException as error:
            self._error = error
            self._first.set()


class Speed:
    """Of learning."""

    steps_per_s = 0.0
