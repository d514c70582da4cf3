"""All tiers in one process, over links that still turn every message into bytes."""

from collections.abc import Callable, Mapping

from gaisnet.config import Config, EdgeSettings
from gaisnet.models.foundation import Foundation
from gaisnet.network import Network
from gaisnet.progress import Progress, silent
from gaisnet.relay.downward import TaskShape
from gaisnet.tiers.cloud import Cloud
from gaisnet.tiers.device import Device
from gaisnet.tiers.edge import Edge
from gaisnet.tiers.examples import DeviceData
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink


def build_network(
    config: Config,
    foundation: Foundation,
    shapes: Mapping[str, TaskShape],
    data: Mapping[str, DeviceData],
    retention_text: str,
    progress: Progress = silent,
    new_ledger: Callable[[], Ledger] = Ledger,
) -> Network:
    """Cloud, edges and devices of a run, joined by local links.

    Args:
        config: The run's configuration.
        foundation: The foundation model.
        shapes: What is public about each domain's task, by domain.
        data: Private examples, by device.
        retention_text: Public text to watch general ability with.
        progress: Told about every step.
        new_ledger: Makes what counts the bytes, one per site that asks others.

    Raises:
        GaisnetError: Something does not fit, before any work.
    """
    codec = Codec(config.wire)
    devices = {  # first: they check their examples, the cloud works for seconds
        settings.name: Device(settings, config, foundation.tokenizer, data[settings.name], progress)
        for _, settings in config.each_device()
    }
    cloud = Cloud(foundation, config, shapes, retention_text, progress)
    cloud_ledger = new_ledger()

    def to_edge(settings: EdgeSettings) -> LocalLink:
        ledger = new_ledger()
        to_cloud = LocalLink(cloud, codec, ledger, "edge_cloud", "up")
        links = {
            device.name: LocalLink(devices[device.name], codec, ledger, "device_edge", "down")
            for device in settings.devices
        }
        edge = Edge(settings, config, to_cloud, links, ledger, progress=progress)
        return LocalLink(edge, codec, cloud_ledger, "edge_cloud", "down")

    return Network(
        cloud, {settings.domain: to_edge(settings) for settings in config.edges}, cloud_ledger, config.faults
    )
