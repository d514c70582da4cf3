"""Label skew: from devices with one main label each to devices that are all alike, and its cost."""

from collections.abc import Sequence

from gaisnet.research.paper.claims import SKEW, Finding, verdict_of
from gaisnet.research.paper.course import COLUMNS, measure
from gaisnet.research.paper.experiment import Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Drawing
from gaisnet.research.paper.fleet import HOW, NETWORKS, dealt, sites
from gaisnet.research.paper.rows import curve_over, having, paired
from gaisnet.runs.table import percent

_ALPHAS = (0.1, 1.0, 10.0, 100.0)
_ACROSS = "alpha"


def _conditions(quick: bool) -> Sequence[Condition]:
    alphas = (_ALPHAS[0], _ALPHAS[-1]) if quick else _ALPHAS
    return [{"network": network, _ACROSS: alpha} for network in NETWORKS for alpha in alphas]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    devices = dealt(setup, float(condition[_ACROSS]), seed)
    return measure(setup, [sites(str(condition["network"]), devices)], "lora", seed)


def _judge(rows: Sequence[Row]) -> Finding:
    ends = paired(rows, _ACROSS, _ALPHAS[-1], _ALPHAS[0], "accuracy")
    told = []
    for network in NETWORKS:
        means = curve_over(_ACROSS, having(rows, {"network": network}), "accuracy", network).means()
        told.append(f"{network}: " + ", ".join(f"{percent(share)} at {alpha:g}" for alpha, share in means))
    holds = [all(alike > skewed for alike, skewed in pairs) for _, pairs in ends]
    return Finding(verdict_of(holds), f"Accuracy by alpha. {'; '.join(told)}.")


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    curves = [curve_over(_ACROSS, having(rows, {"network": each}), "accuracy", each) for each in NETWORKS]
    across = "alpha of the Dirichlet distribution of labels (larger: more alike)"
    return [Drawing("Accuracy by skew of the labels", across, "accuracy on held-out images", curves, logarithmic=True)]


EXPERIMENT = Experiment(
    name="skew",
    title="Devices that differ",
    claim=SKEW,
    method=(
        f"{HOW} Labels are dealt to the devices by a Dirichlet distribution with an alpha of "
        f"{', '.join(f'{alpha:g}' for alpha in _ALPHAS)}; the devices are a hybrid, a federation of local ones, or all "
        "split, and learn a LoRA."
    ),
    rule=f"agrees where accuracy at an alpha of {_ALPHAS[-1]:g} is above that at {_ALPHAS[0]:g} with every seed, in "
    "all three networks; disagrees where that is so in none; else partly.",
    data=("fashion",),
    conditions=_conditions,
    measure=_measure,
    columns=COLUMNS,
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
