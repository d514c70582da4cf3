"""Prompts, LoRA and full weights of the late layers: accuracy of each, and bytes that travel."""

from collections.abc import Sequence

from gaisnet.research.paper.claims import KINDS as CLAIM
from gaisnet.research.paper.claims import Finding, verdict_of
from gaisnet.research.paper.course import COLUMNS, measure
from gaisnet.research.paper.experiment import Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Drawing
from gaisnet.research.paper.fleet import HOW, KINDS, LEARNING_RATES, Site, dealt
from gaisnet.research.paper.rows import curve_along, having, mean_of
from gaisnet.runs.table import human_bytes, percent

_ALPHA, _NEAR, _FRACTION, _MIB = 1.0, 0.02, 0.2, 2**20


def _conditions(quick: bool) -> Sequence[Condition]:
    return [{"adapter": kind} for kind in KINDS]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    (kind,) = (kind for kind in KINDS if kind == condition["adapter"])
    return measure(setup, [[Site(data, "local") for data in dealt(setup, _ALPHA, seed)]], kind, seed)


def _judge(rows: Sequence[Row]) -> Finding:
    found = {
        kind: {name: mean_of(rows, {"adapter": kind}, name) for name in ("accuracy", "parameters", "round_bytes")}
        for kind in KINDS
    }
    full = found["full"]
    holds = [
        each["accuracy"] >= full["accuracy"] - _NEAR
        and all(each[name] <= _FRACTION * full[name] for name in ("parameters", "round_bytes"))
        for kind, each in found.items()
        if kind != "full"
    ]
    told = [
        f"{kind}: {percent(each['accuracy'])} with {each['parameters']:,.0f} weights "
        f"({percent(each['parameters'] / full['parameters'])} of full) and {human_bytes(each['round_bytes'])} per "
        "device and round"
        for kind, each in found.items()
    ]
    return Finding(verdict_of(holds), f"{'; '.join(told)}.")


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    of = {kind: having(rows, {"adapter": kind}) for kind in KINDS}
    upward = "accuracy on held-out images"
    return [
        Drawing(
            "Accuracy by kind of adapter, by round",
            "edge rounds",
            upward,
            [curve_along("round", mine, "accuracy", kind) for kind, mine in of.items()],
        ),
        Drawing(
            "Accuracy by kind of adapter, by bytes",
            "MiB between a device and its edge so far",
            upward,
            [curve_along("device_bytes", mine, "accuracy", kind, _MIB) for kind, mine in of.items()],
            logarithmic=True,
            ticks=False,
        ),
    ]


EXPERIMENT = Experiment(
    name="kinds",
    title="Prompts, LoRA, and full tuning",
    claim=CLAIM,
    method=(
        f"{HOW} Here all devices learn by themselves and send their adapters, labels are dealt with an alpha of "
        f"{_ALPHA:g}. Learning rates: {', '.join(f'{kind} {rate:g}' for kind, rate in LEARNING_RATES.items())}, each "
        "the best of three or more with a seed that is not among these. A classifier is part of every adapter."
    ),
    rule=f"agrees where prompts and LoRA are at most {100 * _NEAR:g} points of mean accuracy below full tuning, each "
    f"with at most {100 * _FRACTION:g} % of its weights that learn and of its bytes per device and round; disagrees "
    "where that is so for neither; else partly.",
    data=("fashion",),
    conditions=_conditions,
    measure=_measure,
    columns=COLUMNS,
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
