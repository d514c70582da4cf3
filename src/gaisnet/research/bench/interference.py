"""Interference: answers alone, fine-tuning alone, and both at the same time."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import quantiles
from typing import Protocol

from gaisnet.research.bench.rounds import Rounds
from gaisnet.research.bench.spread import Spread
from gaisnet.research.bench.writing import Writers
from gaisnet.serving.generation.routing import Target


@dataclass(frozen=True)
class InterferenceFigures:
    """The cost of each for the other. Times are 95th percentiles between two tokens."""

    idle_s: Spread
    tuning_s: Spread
    tuning_vs_idle: Spread
    speed_kept: Spread  # share of fine-tuning speed


class Learning(Protocol):
    """Fine-tuning of a network whose results are discarded."""

    cycle: int

    def fine_tune(self) -> object:
        """Run one round of all edges."""


def beside_learning(writers: Writers, target: Target, network: Learning, rounds: Rounds) -> InterferenceFigures:
    """Measure answers beside fine-tuning. It changes the body that writes, so it comes last.

    Training is timed in whole rounds, because steps of different domains take different times.
    """
    effort = rounds.effort
    idle_s: list[float] = []
    tuning_s: list[float] = []
    ratios: list[float] = []
    kept: list[float] = []

    def p95(enough: Callable[[], bool]) -> float:
        gaps = writers.gaps(target, rounds.prompts, effort.tokens, effort.beside, enough)
        return quantiles(gaps, n=20)[-1]

    def learn() -> float:
        started = time.perf_counter()
        network.fine_tune()
        network.cycle += 1  # an order that was executed would not be executed again
        return time.perf_counter() - started

    learn()  # the first round fills caches
    with ThreadPoolExecutor(1, thread_name_prefix="learning") as pool:
        for _ in rounds.each_round("tuning", 0, ratios):
            idle_s.append(p95(_after(effort.seconds)))
            alone_s = pool.submit(learn).result()
            together = pool.submit(learn)
            tuning_s.append(p95(together.done))
            ratios.append(tuning_s[-1] / idle_s[-1])
            kept.append(alone_s / together.result())
    return InterferenceFigures(*map(Spread.summarize, (idle_s, tuning_s, ratios, kept)))


def _after(seconds: float) -> Callable[[], bool]:
    """Return a function that says whether the seconds have passed."""
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until
