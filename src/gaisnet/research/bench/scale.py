"""Cost of a device in networks of 10 to 10,000: computation per device round, and memory while it is idle.

A device round is one device's part of one edge round: its head once, its steps, its share of averaging. Every network
has a process of its own with one thread, and times are CPU times. A shared processor is still slower for minutes at a
time, so edges take turns with those of a small network, the reference.
"""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field

from gaisnet.checkpoint import write_text
from gaisnet.engines.local import Tiers
from gaisnet.errors import ConfigError
from gaisnet.messages import FineTune
from gaisnet.progress import Progress, silent
from gaisnet.research.bench.analytic_cost import Cost, costs_on_paper
from gaisnet.research.bench.contenders.memory import apart, resident_bytes
from gaisnet.research.bench.simulated import equip, num_edges, simulate
from gaisnet.research.bench.spread import Spread
from gaisnet.tiers.edge.edge import Edge

FILE_NAME = "scale.json"
SIZES = (10, 100, 1_000, 10_000)
REFERENCE = 100
"""Devices of the reference network, which has one edge."""

_EDGES = 5
"""Edge rounds that a process times at least: smaller networks are built and timed again."""

_BETWEEN = 4
"""Edge rounds between those of the reference network."""


class SizeFigures(BaseModel):
    """Figures of the networks of one size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    devices: int
    edges: int
    device_round_s: Spread = Field(description="Of processor time, per device; the edges' work is part of it.")
    device_round_vs_reference: Spread = Field(description="Over that of ``reference`` devices, edges taking turns.")
    equip_s: Spread = Field(description="To give a device its part of the model, per device.")
    idle_bytes: Spread = Field(
        description="Memory per device when all have their part of the model; cloud, edges and links included."
    )
    kept_bytes: Spread = Field(description="The same after an edge round: with what edges keep of devices' examples.")


class ScaleFigures(BaseModel):
    """Contents of ``scale.json``."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    schema_name: str = Field("gaisnet.scale/1", alias="schema", pattern="^gaisnet.scale/1$")
    torch: str
    reference: int = Field(description="Devices of the network that others are compared with.")
    sizes: tuple[SizeFigures, ...]
    on_paper: dict[str, Cost] = Field(description="What real models would cost, computed from their shapes.")


@dataclass(frozen=True)
class Sample:
    """Measurement of one process."""

    device_round_s: float
    reference_s: float  # per device round in the reference network
    equip_s: float
    idle_bytes: float
    kept_bytes: float


def measure_scale(sizes: Sequence[int] = SIZES, rounds: int = 5, progress: Progress = silent) -> ScaleFigures:
    """Measure networks of these numbers of devices, ``rounds`` times each.

    Raises ``ConfigError`` for no sizes or one below 1, and ``MeasureError`` if a process fails.
    """
    if not sizes or min(sizes) < 1:
        raise ConfigError("the sizes of networks", f"are {list(sizes)}", "name numbers of devices, such as 10,100")
    kept: dict[int, list[Sample]] = {size: [] for size in sorted(set(sizes))}
    total = rounds * len(kept)
    for done in range(total):
        size = list(kept)[done % len(kept)]
        progress("bench_scale", done, total, {})
        kept[size].append(apart(sample, size))
    progress("bench_scale", total, total, {})
    return ScaleFigures(
        torch=torch.__version__,
        reference=REFERENCE,
        sizes=tuple(_figures(size, samples) for size, samples in kept.items()),
        on_paper=costs_on_paper(),
    )


def write_scale(figures: ScaleFigures, path: Path) -> None:
    """Write the figures to a file. Raises ``OutputNotWritable``."""
    write_text(path, figures.model_dump_json(indent=2) + "\n")


def sample(num_devices: int) -> Sample:
    """Build a network in this (new) process, and run an edge round with all devices."""
    torch.set_num_threads(1)
    _round_of(1)  # loads whatever is loaded only once
    before = _resident()
    tiers, equip_s = _equipped(num_devices)
    idle_bytes = _resident() - before
    own, reference = _in_turn(tiers)
    kept_bytes = _resident() - before
    while len(own) < _EDGES:
        again = _in_turn(_equipped(num_devices)[0])
        own, reference = own + again[0], reference + again[1]
    num_rounds = num_devices * len(own) / num_edges(num_devices)
    return Sample(
        device_round_s=sum(own) / num_rounds,
        reference_s=sum(reference) / len(reference) / REFERENCE,
        equip_s=equip_s / num_devices,
        idle_bytes=idle_bytes / num_devices,
        kept_bytes=kept_bytes / num_devices,
    )


def _equipped(num_devices: int) -> tuple[Tiers, float]:
    """Return a network whose devices have their parts, and the seconds that this took."""
    tiers = simulate(num_devices)
    tiers.network.install()
    started = time.process_time()
    equip(tiers)
    return tiers, time.process_time() - started


def _in_turn(tiers: Tiers) -> tuple[list[float], list[float]]:
    """Time a round of every edge, and of reference networks in between, in seconds."""
    own, reference = [], []
    for number, edge in enumerate(tiers.edges.values()):
        own.append(_round(edge))
        if number % _BETWEEN == 0:
            reference.append(_round_of(REFERENCE))
    return own, reference


def _round_of(num_devices: int) -> float:
    """Time a round of a new network with one edge."""
    (edge,) = _equipped(num_devices)[0].edges.values()
    return _round(edge)


def _round(edge: Edge) -> float:
    """Time an edge round with all devices, in seconds."""
    started = time.process_time()
    edge.handle(FineTune(0))
    return time.process_time() - started


def _resident() -> int:
    gc.collect()
    return resident_bytes()


def _figures(size: int, samples: Sequence[Sample]) -> SizeFigures:
    return SizeFigures(
        devices=size,
        edges=num_edges(size),
        device_round_s=Spread.summarize([one.device_round_s for one in samples]),
        device_round_vs_reference=Spread.summarize([one.device_round_s / one.reference_s for one in samples]),
        equip_s=Spread.summarize([one.equip_s for one in samples]),
        idle_bytes=Spread.summarize([one.idle_bytes for one in samples]),
        kept_bytes=Spread.summarize([one.kept_bytes for one in samples]),
    )
