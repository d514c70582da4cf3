"""Answers alone, fine-tuning alone, and both at the same time."""

import time
from dataclasses import dataclass
from statistics import quantiles

from gaisnet.bench.learner import Learner
from gaisnet.bench.rounds import Rounds
from gaisnet.bench.spread import Spread
from gaisnet.bench.writing import Writers
from gaisnet.network import Network
from gaisnet.serving.bodies import Target


@dataclass(frozen=True)
class Beside:
    """What one costs the other. Times are those between two tokens, 95th percentile."""

    idle_s: Spread
    tuning_s: Spread
    tuning_vs_idle: Spread
    speed_kept: Spread  # of fine-tuning


def beside_learning(writers: Writers, target: Target, learner: Learner, network: Network, rounds: Rounds) -> Beside:
    """What is learned changes the body that writes, so this comes last."""
    effort = rounds.effort
    idle_s: list[float] = []
    tuning_s: list[float] = []
    ratios: list[float] = []
    kept: list[float] = []

    def p95() -> float:
        gaps = writers.gaps(target, rounds.prompts, effort.tokens, effort.beside, effort.seconds)
        return quantiles(gaps, n=20)[-1]

    with learner.learning(network):
        for _ in rounds.of("tuning", 0, ratios):
            idle_s.append(p95())
            with learner.runs() as alone:
                time.sleep(effort.seconds)
            with learner.runs() as together:
                tuning_s.append(p95())
            ratios.append(tuning_s[-1] / idle_s[-1])
            kept.append(together.steps_per_s / alone.steps_per_s)
    return Beside(*map(Spread.of, (idle_s, tuning_s, ratios, kept)))
