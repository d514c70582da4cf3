"""Serving on one machine: the bodies of a local network are served, while it may go on training.

A device's sessions take the same path as between machines: over a link to its edge, and from there to the cloud,
every message as bytes.
"""

import os
from collections.abc import Callable, Collection, Mapping

import torch

from gaisnet.compute_lock import ComputeLock, PartitionedCores
from gaisnet.config import Config, EdgeSettings, ServiceSettings
from gaisnet.data.examples import DeviceData
from gaisnet.engines.body_hosting import BodyPublisher, LinkedBodies, PeerRouter
from gaisnet.engines.local import Tiers, build_tiers
from gaisnet.errors import SessionRefused
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import Foundation
from gaisnet.models.parts import Body
from gaisnet.network import Network
from gaisnet.progress import Progress, silent
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.engine.endpoint import SessionEndpoint
from gaisnet.serving.engine.escalation import EdgeSessions
from gaisnet.serving.generation.decoding import DeviceParts
from gaisnet.serving.generation.routing import Place
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink


class MachinePublishers:
    """Publishers for every tier's body on one machine, which share its compute lock.

    Args:
        settings: Settings of each service.
        domains: Domains of the edges.
        compute_lock: The machine's lock; None for one that fits it.
    """

    def __init__(self, settings: ServiceSettings, domains: list[str], compute_lock: ComputeLock | None = None) -> None:
        self.compute_lock = compute_lock or compute_lock_for(settings)
        self.of_cloud = BodyPublisher(settings, self.compute_lock)
        self.of_edges = {domain: BodyPublisher(settings, self.compute_lock) for domain in domains}

    def cloud(self) -> BodyPublisher:
        """Return the FM's publisher."""
        return self.of_cloud

    def edge(self, domain: str) -> BodyPublisher:
        """Return the publisher of a domain's DM."""
        return self.of_edges[domain]

    @property
    def services(self) -> list[BodyService]:
        """Services that run now."""
        every = (*self.of_edges.values(), self.of_cloud)
        return [publisher.service for publisher in every if publisher.serves]

    def close(self) -> None:
        """End all services."""
        for publisher in (*self.of_edges.values(), self.of_cloud):
            publisher.close()


class ServedNetwork(LinkedBodies):
    """A network of local tiers whose bodies are served; implements ``Bodies`` for its devices.

    Args:
        config: The run's configuration.
        tiers: Built with ``publishers``; has its models after ``network.install()``.
        publishers: Serve the bodies.
    """

    def __init__(self, config: Config, tiers: Tiers, publishers: MachinePublishers) -> None:
        self.network: Network = tiers.network
        self.compute_lock = publishers.compute_lock
        """The machine's lock, to hold for serving while a device's head and tail compute."""
        self.ledger = Ledger()
        """Bytes of answers; those of training are counted by the network."""
        self._config = config
        self._tiers = tiers
        self._publishers = publishers
        self._settings = {settings.domain: settings for settings in config.edges}
        self._parts: dict[str, DeviceParts] = {}
        super().__init__(
            {settings.domain: self._link(settings) for settings in config.edges}, config.faults.step_deadline_s
        )

    def adapters(self, body: Place, domain: str) -> list[str]:
        """Return names for a ``Target``. Raises ``SessionRefused`` before the body has its model."""
        return self._publisher(body, domain).service.adapters

    def service(self, place: Place, domain: str) -> BodyService:
        """Return the service of a body. Raises ``SessionRefused`` before there is a model."""
        return self._publisher(place, domain).service

    def served_body(self, place: Place, domain: str) -> Body:
        """Return the served body; training may change it. Raises ``SessionRefused`` before there is a model."""
        return self.service(place, domain).body

    @property
    def num_sessions(self) -> int:
        """Number of open sessions on all bodies."""
        return sum(service.num_sessions for service in self._publishers.services)

    @property
    def used_bytes(self) -> int:
        """Memory in use by sessions."""
        return sum(service.used_bytes for service in self._publishers.services)

    def parts(self, device: str) -> DeviceParts:
        """Return head and tail of a device, to write answers of any domain; call it before training goes on.

        Raises ``SessionRefused`` for an unknown device, or one that cannot be reached.
        """
        if device not in self._parts:
            domains = {one.name: edge.domain for edge, one in self._config.each_device()}
            if device not in domains:
                raise SessionRefused(f"device '{device}'", f"the run has {', '.join(domains)}", "name one of those")
            self._tiers.edges[domains[device]].equip_device(device)
            self._parts[device] = DeviceParts(*self._tiers.devices[device].decoder_parts(), self.compute_lock)
        return self._parts[device]

    def device(self, domain: str) -> str:
        """Return the default device of a domain for answers: the first split one."""
        devices = self._settings[domain].devices
        return next((device.name for device in devices if device.mode == "split"), devices[0].name)

    def close(self) -> None:
        """End all sessions and services."""
        self._publishers.close()

    def _publisher(self, place: Place, domain: str) -> BodyPublisher:
        return self._publishers.cloud() if place == "cloud" else self._publishers.edge(domain)

    def _link(self, edge: EdgeSettings) -> LocalLink:
        """Return a link from an edge's device up to it; the edge has its own link to the cloud."""
        codec, device = Codec(self._config.wire), self.device(edge.domain)
        of_edge = PeerRouter(
            None, self._publishers.cloud(), lambda service: SessionEndpoint(service, edge.name), edge.name
        )
        cloud = LocalLink(of_edge, codec, self.ledger, "edge_cloud", "up")
        publisher = self._publishers.edge(edge.domain)
        of_device = PeerRouter(None, publisher, lambda service: EdgeSessions(service, cloud, device), device)
        return LocalLink(of_device, codec, self.ledger, "device_edge", "up")


def build_served_network(
    config: Config,
    foundation: Foundation,
    shapes: Mapping[str, TaskTemplate],
    data: Mapping[str, DeviceData],
    retention_text: str,
    progress: Progress = silent,
    new_ledger: Callable[[], Ledger] = Ledger,
    compute_lock: ComputeLock | None = None,
    absent: Collection[str] = (),
) -> ServedNetwork:
    """Build a local network whose bodies are served; close it in the end. Raises ``GaisnetError``.

    Args:
        config: As for ``build_tiers``, like all others but the last two.
        foundation: The FM.
        shapes: Task templates by domain.
        data: Examples by device.
        retention_text: Public text.
        progress: Told about every step.
        new_ledger: Counts the bytes of training.
        compute_lock: This machine's lock; None for one that fits it.
        absent: Devices whose examples are missing; the network only answers then.
    """
    publishers = MachinePublishers(config.service, [edge.domain for edge in config.edges], compute_lock)
    try:
        tiers = build_tiers(
            config, foundation, shapes, data, retention_text, progress, new_ledger, publishers, absent=absent
        )
    except BaseException:
        publishers.close()
        raise
    return ServedNetwork(config, tiers, publishers)


def compute_lock_for(settings: ServiceSettings) -> ComputeLock:
    """Return a lock that runs answers and training side by side if this process has several cores."""
    cores, most = num_cores(), torch.get_num_threads()
    if cores < 2:
        return ComputeLock(settings.fine_tune_share)
    return PartitionedCores(settings.fine_tune_share, cores, lambda some: torch.set_num_threads(min(some, most)))


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux knows which cores are ours
    return len(affinity(0)) if affinity else os.cpu_count() or 1
