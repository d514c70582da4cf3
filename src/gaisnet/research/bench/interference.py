"""Answers alone, fine-tuning alone, and both at the same time."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import quantiles
from typing import Protocol

from gaisnet.research.bench.rounds import Rounds
from gaisnet.research.bench.spread import Spread
from gaisnet.research.bench.writing import Writers
from gaisnet.serving.generation.bodies import Target


@dataclass(frozen=True)
class InterferenceFigures:
    """What one costs the other. Times are those between two tokens, 95th percentile."""

    idle_s: Spread
    tuning_s: Spread
    tuning_vs_idle: Spread
    speed_kept: Spread  # of fine-tuning


class Learning(Protocol):
    """What a network does; what comes of it is thrown away."""

    cycle: int

    def fine_tune(self) -> object:
        """One round of all edges."""


def beside_learning(writers: Writers, target: Target, network: Learning, rounds: Rounds) -> InterferenceFigures:
    """What is learned changes the body that writes, so this comes last.

    Learning is timed by whole rounds: its steps are of different lengths, those of one domain and of another above all.
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
        network.cycle += 1  # an order that was carried out would not be carried out again
        return time.perf_counter() - started

    learn()  # whoever learns first fills caches
    with ThreadPoolExecutor(1, thread_name_prefix="learning") as pool:
        for _ in rounds.of("tuning", 0, ratios):
            idle_s.append(p95(_after(effort.seconds)))
            alone_s = pool.submit(learn).result()
            together = pool.submit(learn)
            tuning_s.append(p95(together.done))
            ratios.append(tuning_s[-1] / idle_s[-1])
            kept.append(alone_s / together.result())
    return InterferenceFigures(*map(Spread.of, (idle_s, tuning_s, ratios, kept)))


def _after(seconds: float) -> Callable[[], bool]:
    """Whether they have passed."""
    until = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= until
