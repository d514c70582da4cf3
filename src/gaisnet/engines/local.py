"""All tiers of a run in one process, over links that still turn every message into bytes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import Config, DeviceSettings, EdgeSettings
from gaisnet.data.examples import DeviceData, Input
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import Foundation, with_context
from gaisnet.network import Network
from gaisnet.progress import Progress, silent
from gaisnet.tiers.cloud.cloud import Cloud
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.device.shared_weights import SharedWeights
from gaisnet.tiers.edge.edge import Edge
from gaisnet.tiers.split.layout import with_family_defaults
from gaisnet.tiers.split.publisher import NoPublisher, Publisher
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink


@dataclass(frozen=True)
class Tiers:
    """The tiers of a run, and their network."""

    devices: Mapping[str, Device]  # by name
    edges: Mapping[str, Edge]  # by domain
    cloud: Cloud
    network: Network


class Publishers(Protocol):
    """Makes the publishers of the tiers on a machine."""

    compute_lock: ComputeLock

    def cloud(self) -> Publisher:
        """Return the FM's publisher."""

    def edge(self, domain: str) -> Publisher:
        """Return the publisher of a domain's DM."""


class NoPublishers:
    """Publishers of a run that serves no answers."""

    def __init__(self) -> None:
        self.compute_lock = ComputeLock()

    def cloud(self) -> Publisher:
        """Return one that drops everything."""
        return NoPublisher(self.compute_lock)

    def edge(self, domain: str) -> Publisher:
        """Return one that drops everything."""
        return NoPublisher(self.compute_lock)


def build_network(
    config: Config,
    foundation: Foundation,
    shapes: Mapping[str, TaskTemplate],
    data: Mapping[str, DeviceData[Any]],
    retention_text: str,
    progress: Progress = silent,
    new_ledger: Callable[[], Ledger] = Ledger,
    public_inputs: Sequence[Input] = (),
) -> Network:
    """Build cloud, edges and devices, joined by local links; arguments as for ``build_tiers``."""
    return build_tiers(
        config, foundation, shapes, data, retention_text, progress, new_ledger, NoPublishers(), public_inputs
    ).network


def build_tiers(
    config: Config,
    foundation: Foundation,
    shapes: Mapping[str, TaskTemplate],
    data: Mapping[str, DeviceData[Any]],
    retention_text: str,
    progress: Progress,
    new_ledger: Callable[[], Ledger],
    publishers: Publishers,
    public_inputs: Sequence[Input] = (),
    absent: Collection[str] = (),
) -> Tiers:
    """Build cloud, edges and devices of a run, joined by local links.

    Args:
        config: The run's configuration.
        foundation: The foundation model.
        shapes: Public description of each domain's task, by domain.
        data: Private examples, by device.
        retention_text: Public text to measure general ability; unused by an encoder.
        progress: Told about every step.
        new_ledger: Makes a counter of bytes, one per asking site.
        publishers: Serve bodies and adapters.
        public_inputs: For an encoder, in place of public text: unlabelled texts or images.
        absent: Devices whose examples are missing; the network can then neither train nor be evaluated.

    Raises:
        GaisnetError: Something does not fit, before any work.
    """
    config = with_family_defaults(with_context(config, foundation.model.config), foundation.family)
    codec, compute_lock = Codec(config.wire), publishers.compute_lock
    shared_weights = SharedWeights(config, compute_lock)
    nothing: DeviceData[Any] = DeviceData((), ())

    def device_of(edge: EdgeSettings, one: DeviceSettings) -> Device:
        present = one.name not in absent
        mine, learns = data[one.name] if present else nothing, present and not edge.follows
        return Device(
            one, config, foundation.reader, mine, progress, compute_lock, shared_weights, learns, present, edge.labels
        )

    # First: devices check their examples, while the cloud works for seconds.
    devices = {one.name: device_of(edge, one) for edge, one in config.each_device()}
    cloud = Cloud(foundation, config, shapes, retention_text, progress, publishers.cloud(), public_inputs)
    cloud_ledger = new_ledger()

    def edge_of(settings: EdgeSettings) -> Edge:
        ledger = new_ledger()
        to_cloud = LocalLink(cloud, codec, ledger, "edge_cloud", "up")
        links = {
            device.name: LocalLink(devices[device.name], codec, ledger, "device_edge", "down")
            for device in settings.devices
        }
        publisher = publishers.edge(settings.domain)
        return Edge(settings, config, to_cloud, links, ledger, progress=progress, publisher=publisher)

    edges = {settings.domain: edge_of(settings) for settings in config.edges}
    to_edges = {name: LocalLink(edge, codec, cloud_ledger, "edge_cloud", "down") for name, edge in edges.items()}
    return Tiers(devices, edges, cloud, Network(cloud, to_edges, cloud_ledger, config.faults))
