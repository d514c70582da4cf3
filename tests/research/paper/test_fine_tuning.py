"""The experiments on fine-tuning: verdicts by their rules and pictures, on rows with known figures."""

from collections.abc import Callable, Mapping

import pytest

from gaisnet.research.paper import clusters, hybrid, kinds, skew
from gaisnet.research.paper.experiment import Condition, Experiment, Row

Figures = Callable[[Condition, int], Mapping[str, float]]
COST = {"parameters": 100.0, "once_bytes": 1.0, "round_bytes": 100.0, "device_bytes": 2.0**20, "device_flops": 1e9}
EVERY = [kinds.EXPERIMENT, hybrid.EXPERIMENT, skew.EXPERIMENT, clusters.EXPERIMENT]


def rows(one: Experiment, figures: Figures) -> list[Row]:
    """Two rounds; the second ends with the figures, the first is half of it."""
    found = []
    for condition, seed in one.units(quick=False).values():
        mine = {**COST, "accuracy": 0.5, **figures(condition, seed)}
        names = ("accuracy", "device_bytes", "device_flops")
        curves = {"round": (1.0, 2.0), **{name: (mine[name] / 2, mine[name]) for name in names}}
        found.append(Row(condition=condition, seed=seed, seconds=1.0, figures=mine, curves=curves))
    return found


@pytest.mark.parametrize("one", EVERY, ids=lambda one: str(one.name))
def test_every_condition_is_drawn(one: Experiment) -> None:
    assert set(one.columns) <= {"accuracy", *COST}
    for drawing in one.draw(rows(one, lambda condition, seed: {"accuracy": 0.5 + seed / 100})):
        assert all(
            list(seeds) in ([0.5, 0.51, 0.52], [0.25, 0.255, 0.26]) for c in drawing.curves for _, seeds in c.values
        )


@pytest.mark.parametrize(
    ("prompts", "lora", "verdict"),
    [
        (
            {"round_bytes": 20.0, "parameters": 20.0, "accuracy": 0.481},
            {"round_bytes": 1.0, "parameters": 1.0},
            "agrees",
        ),
        (
            {"round_bytes": 20.0, "parameters": 20.0, "accuracy": 0.47},
            {"round_bytes": 1.0, "parameters": 1.0},
            "partly",
        ),
        ({"round_bytes": 1.0, "parameters": 21.0}, {"round_bytes": 21.0, "parameters": 1.0}, "disagrees"),
    ],
)
def test_kinds(prompts: dict[str, float], lora: dict[str, float], verdict: str) -> None:
    given = {"prompts": prompts, "lora": lora, "full": {}}
    finding = kinds.EXPERIMENT.judge(rows(kinds.EXPERIMENT, lambda condition, seed: given[str(condition["adapter"])]))
    assert finding.verdict == verdict
    assert "full: 50.0 % with 100 weights (100.0 % of full) and 100 B per device and round" in finding.measured


@pytest.mark.parametrize(
    ("accuracy", "device_bytes", "device_flops", "verdict"),
    [
        (0.485, 1e6, 9e8, "agrees"),
        (0.47, 1e6, 9e8, "disagrees"),
        (0.5, 2e6, 9e8, "partly"),
        (0.47, 2e6, 2e9, "disagrees"),
    ],
)
def test_hybrid(accuracy: float, device_bytes: float, device_flops: float, verdict: str) -> None:
    mine = {"accuracy": accuracy, "device_bytes": device_bytes, "device_flops": device_flops}
    one = hybrid.EXPERIMENT
    finding = one.judge(rows(one, lambda condition, seed: mine if condition["network"] == "hybrid" else {}))
    assert finding.verdict == verdict and "All examples in one place: 50.0 %" in finding.measured
    by_bytes = next(drawing for drawing in one.draw(rows(one, lambda c, s: {})) if drawing.title.endswith("by bytes"))
    assert [curve.means() for curve in by_bytes.curves] == [[(0.5, 0.25), (1.0, 0.5)]] * 3


@pytest.mark.parametrize(
    ("losing", "verdict"), [([], "agrees"), (["split"], "partly"), (["split", "hybrid", "federated"], "disagrees")]
)
def test_skew(losing: list[str], verdict: str) -> None:
    def figures(condition: Condition, seed: int) -> dict[str, float]:
        against = seed == 2 and condition["network"] in losing
        return {"accuracy": 0.5 + (-1 if against else 1) * float(condition["alpha"]) / 1000}

    assert skew.EXPERIMENT.judge(rows(skew.EXPERIMENT, figures)).verdict == verdict


@pytest.mark.parametrize(
    ("at_low", "at_high", "verdict"),
    [
        ((0.5, 0.6, 0.7, 0.65), (0.5, 0.8, 0.7, 0.6), "agrees"),
        ((0.5, 0.6, 0.7, 0.71), (0.5, 0.8, 0.7, 0.6), "partly"),
        ((0.5, 0.6, 0.7, 0.8), (0.9, 0.8, 0.7, 0.6), "disagrees"),
    ],
)
def test_clusters(at_low: tuple[float, ...], at_high: tuple[float, ...], verdict: str) -> None:
    def figures(condition: Condition, seed: int) -> dict[str, float]:
        of = at_low if condition["alpha"] == 0.1 else at_high
        return {"accuracy": of[(1, 2, 4, 8).index(int(condition["clusters"]))] + seed / 1000}

    finding = clusters.EXPERIMENT.judge(rows(clusters.EXPERIMENT, figures))
    assert finding.verdict == verdict and "alpha 0.1: 50.1 % with 1, 60.1 % with 2" in finding.measured
