"""Hybrid federated split learning against federated, split and pooled training: by round, byte and operation."""

from collections.abc import Sequence

from gaisnet.research.paper.claims import HYBRID, Finding, verdict_of
from gaisnet.research.paper.course import COLUMNS, measure
from gaisnet.research.paper.experiment import Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Drawing
from gaisnet.research.paper.fleet import HOW, NETWORKS, Site, dealt, pooled, sites
from gaisnet.research.paper.rows import curve_along, having, mean_of
from gaisnet.runs.table import human_bytes, percent

_ALPHA, _NEAR, _MIB, _GIGA = 1.0, 0.02, 2**20, 1e9
_POOLED = "pooled"


def _conditions(quick: bool) -> Sequence[Condition]:
    return [{"network": network} for network in (*NETWORKS, _POOLED)]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    network = str(condition["network"])
    if network == _POOLED:
        return measure(setup, [[Site(pooled(setup, seed), "local")]], "lora", seed)
    return measure(setup, [sites(network, dealt(setup, _ALPHA, seed))], "lora", seed)


def _judge(rows: Sequence[Row]) -> Finding:
    found = {
        network: {
            name: mean_of(rows, {"network": network}, name) for name in ("accuracy", "device_bytes", "device_flops")
        }
        for network in (*NETWORKS, _POOLED)
    }
    hybrid, federated = found["hybrid"], found["federated"]
    near = [hybrid["accuracy"] >= found[other]["accuracy"] - _NEAR for other in ("federated", "split")]
    cheaper = all(hybrid[cost] < federated[cost] for cost in ("device_bytes", "device_flops"))
    holds = [near[0] and cheaper, near[1]]
    told = [
        f"{network}: {percent(each['accuracy'])}, {human_bytes(each['device_bytes'])} and {each['device_flops']:.2e} "
        "operations per device"
        for network, each in found.items()
        if network != _POOLED
    ]
    return Finding(
        verdict_of(holds),
        f"{'; '.join(told)}. All examples in one place: {percent(found[_POOLED]['accuracy'])}.",
    )


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    of = {network: having(rows, {"network": network}) for network in (*NETWORKS, _POOLED)}
    upward = "accuracy on held-out images"
    by_round = [curve_along("round", mine, "accuracy", network) for network, mine in of.items()]
    by_cost = {
        "bytes": ("device_bytes", _MIB, "MiB between a device and its edge so far"),
        "operations": ("device_flops", _GIGA, "billions of operations of a device so far"),
    }
    return [
        Drawing("Accuracy by network, by round", "edge rounds", upward, by_round),
        *(
            Drawing(
                f"Accuracy by network, by {what}",
                across,
                upward,
                [curve_along(cost, of[network], "accuracy", network, unit) for network in NETWORKS],
                logarithmic=True,
                ticks=False,
            )
            for what, (cost, unit, across) in by_cost.items()
        ),
    ]


EXPERIMENT = Experiment(
    name="hybrid",
    title="Hybrid federated split learning",
    claim=HYBRID,
    method=(
        f"{HOW} The same devices are a hybrid, in which every second one is split and the others are local, a "
        f"federation of local ones, or all split; labels are dealt with an alpha of {_ALPHA:g}. Pooled: one device has "
        "all images. Adapters are LoRA, with one learning rate for all. Bytes are those between devices and edges, "
        "with what a device downloads at first; operations are computed from shapes, and a split device's are those of "
        "its head, once."
    ),
    rule=f"holds against federated learning where the hybrid's mean accuracy is at most {100 * _NEAR:g} points below, "
    "at fewer bytes and operations of the mean device, and against split learning where it is at most as far below. "
    "Agrees where both hold, disagrees where neither does; else partly.",
    data=("fashion",),
    conditions=_conditions,
    measure=_measure,
    columns=COLUMNS,
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
