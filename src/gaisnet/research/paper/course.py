"""A network of devices that learns to classify images, measured round by round.

Every message crosses a link, as in any run of GaisNet. The domain model is the foundation model itself, in float32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from transformers import ViTModel

from gaisnet.config import Config
from gaisnet.config.file import parse_config
from gaisnet.data.examples import DeviceData, Labelled
from gaisnet.data.images import ImageData, Images
from gaisnet.engines.local import NoPublishers, Tiers, build_tiers
from gaisnet.errors import DataError
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import Evaluate, EvaluationReport, TrafficReport, TrafficRequest
from gaisnet.models.foundation import Foundation
from gaisnet.models.pretrained import pretrained_model
from gaisnet.progress import silent
from gaisnet.research.paper.experiment import Column, Measured, Setup
from gaisnet.research.paper.fleet import (
    EPOCHS,
    FIRST_LAYER,
    HEAD_LAYERS,
    LEARNING_RATES,
    QUICK_ROUNDS,
    ROUNDS,
    Kind,
    Site,
)
from gaisnet.research.paper.flops import Work, flops_per_example
from gaisnet.runs.table import human_bytes, percent
from gaisnet.transport.ledger import Ledger


@dataclass(frozen=True)
class FineTuningRun:
    """The course of a training run; curves have one value per round.

    Attributes:
        accuracy: Accuracy on all devices' test images, each scored by its own cluster's model.
        device_bytes: Bytes between the mean device and its edge so far, both ways; one-time transfers count in the
            first round.
        device_flops: Operations of the mean device so far, computed from shapes.
        parameters: Trainable parameters of one adapter.
    """

    accuracy: tuple[float, ...]
    device_bytes: tuple[float, ...]
    device_flops: tuple[float, ...]
    parameters: int


def measure(setup: Setup, clusters: Sequence[Sequence[Site]], kind: Kind, seed: int) -> Measured:
    """Measure how a network of these devices learns; ``COLUMNS`` lists the figures."""
    course = learn(setup.foundation(), clusters, kind, QUICK_ROUNDS if setup.quick else ROUNDS, seed)
    rounds = len(course.accuracy)
    first, last = course.device_bytes[0], course.device_bytes[-1]
    return Measured(
        figures={
            "accuracy": course.accuracy[-1],
            "parameters": course.parameters,
            "once_bytes": first - (last - first) / (rounds - 1),
            "round_bytes": (last - first) / (rounds - 1),
            "device_bytes": last,
            "device_flops": course.device_flops[-1],
        },
        curves={
            "round": tuple(map(float, range(1, rounds + 1))),
            "accuracy": course.accuracy,
            "device_bytes": course.device_bytes,
            "device_flops": course.device_flops,
        },
    )


COLUMNS: Mapping[str, Column] = {
    "accuracy": Column("accuracy", percent),
    "parameters": Column("weights that learn", "{:,.0f}".format),
    "once_bytes": Column("per device, once", human_bytes),
    "round_bytes": Column("per device and round", human_bytes),
    "device_flops": Column("operations of a device", "{:.2e}".format),
}
"""Columns of the table of an experiment that uses ``measure``."""


def learn(folder: Path, clusters: Sequence[Sequence[Site]], kind: Kind, num_rounds: int, seed: int) -> FineTuningRun:
    """Train one adapter per cluster of devices, each at an edge of its own.

    Args:
        folder: The pre-trained encoder.
        clusters: Devices of each cluster.
        kind: The kind of adapter.
        num_rounds: Cycles of the network, of one edge round each.
        seed: Draws the adapters' initial weights and the order of examples.

    Raises:
        DataError: A device was left out of a round, or an adapter was rejected.
    """
    tiers = _tiers(folder, clusters, kind, num_rounds, seed)
    sites = [site for cluster in clusters for site in cluster]
    accuracy, round_bytes = [], []
    tiers.network.install()
    for _ in range(num_rounds):
        before = _bytes(tiers)
        tiers.network.release()
        faults = [fault for update in tiers.network.fine_tune().values() for fault in update.faults]
        faults += tiers.network.drain_faults()
        round_bytes.append(_bytes(tiers) - before)
        refused = [str(verdict) for verdict in tiers.network.absorb() if not verdict.accepted]
        if faults or refused:  # figures are reported for all devices
            raise DataError("the experiment's network", "; ".join([*faults, *refused]), "lower the learning rate")
        accuracy.append(_accuracy(tiers))
    adapter = tiers.cloud.adapter("cluster-0")[1]
    return FineTuningRun(
        tuple(accuracy),
        tuple(total / len(sites) for total in accumulate(round_bytes)),
        tuple(_flops(folder, sites, kind, done) / len(sites) for done in range(1, num_rounds + 1)),
        sum(tensor.numel() for tensor in adapter.values()),
    )


def _tiers(folder: Path, clusters: Sequence[Sequence[Site]], kind: Kind, num_rounds: int, seed: int) -> Tiers:
    model, _ = pretrained_model(ViTModel, str(folder), str(folder), add_pooling_layer=False)
    foundation = Foundation("vit", model.requires_grad_(False).eval(), None)
    config = _config(clusters, kind, num_rounds, seed)
    shapes = {edge.domain: TaskTemplate(edge.template, edge.labels) for edge in config.edges}
    sites = [site for cluster in clusters for site in cluster]
    data = {device.name: _held(site.data) for (_, device), site in zip(config.each_device(), sites, strict=True)}
    return build_tiers(config, foundation, shapes, data, "", silent, Ledger, NoPublishers())


def _config(clusters: Sequence[Sequence[Site]], kind: Kind, num_rounds: int, seed: int) -> Config:
    edges = [
        {
            "name": f"edge-{number}",
            "domain": f"cluster-{number}",
            "labels": list(cluster[0].data.labels),
            "devices": [
                {"name": f"device-{number}-{i}", "mode": site.mode, "head_layers": HEAD_LAYERS}
                for i, site in enumerate(cluster)
            ],
        }
        for number, cluster in enumerate(clusters)
    ]
    return parse_config(
        {
            "seed": seed,
            "cycles": num_rounds,
            "domain": {"precision": "float32"},
            "adapters": {"kind": kind, "first_layer": FIRST_LAYER},
            "fine_tune": {"local_epochs": EPOCHS, "learning_rate": LEARNING_RATES[kind]},
            "edges": edges,
        }
    )


def _held(data: ImageData) -> DeviceData[Labelled]:
    def labelled(images: Images) -> tuple[Labelled, ...]:
        pairs = zip(images.pixels_NCHW(), images.labels_N.tolist(), strict=True)
        return tuple(Labelled(pixels_CHW, data.labels[label]) for pixels_CHW, label in pairs)

    return DeviceData(labelled(data.train), labelled(data.test))


def _accuracy(tiers: Tiers) -> float:
    reports = [edge.handle(Evaluate("domain", None)) for edge in tiers.edges.values()]
    scores = [report for report in reports if isinstance(report, EvaluationReport)]
    return sum(each.num_correct for each in scores) / sum(each.num_examples for each in scores)


def _bytes(tiers: Tiers) -> int:
    """Return the bytes between devices and edges so far."""
    reports = [edge.handle(TrafficRequest()) for edge in tiers.edges.values()]
    return sum(each.device_edge_up + each.device_edge_down for each in reports if isinstance(each, TrafficReport))


def _flops(folder: Path, sites: Sequence[Site], kind: Kind, num_rounds: int) -> float:
    """Return the operations of all devices in this many rounds."""
    works = {
        "split": Work(once=HEAD_LAYERS),
        "local": Work(once=FIRST_LAYER, from_layer=FIRST_LAYER, passes=EPOCHS * num_rounds, all_learn=kind == "full"),
    }
    each = {mode: flops_per_example(folder, work) for mode, work in works.items()}
    return sum(len(site.data.train) * each[site.mode] for site in sites)
