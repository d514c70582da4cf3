"""The HTTP endpoint in a device's process: callers on the device are answered while the network trains."""

import logging
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import RoutingSettings
from gaisnet.deployment.site import Site
from gaisnet.engines.body_hosting import LinkedBodies
from gaisnet.errors import GaisnetError, OutputNotWritable, UnexpectedMessage
from gaisnet.runs.answering_device import calibration_examples
from gaisnet.serving.generation.answering import Answering
from gaisnet.serving.generation.calibration import read_calibrations, write_calibrations
from gaisnet.serving.generation.decoding import DeviceParts
from gaisnet.serving.generation.device import AnsweringDevice, ServedDomain
from gaisnet.serving.generation.routing import Target
from gaisnet.serving.http.address import publish_address
from gaisnet.serving.http.api import make_app
from gaisnet.serving.http.callers import ApiKeys
from gaisnet.serving.http.server import Server, listen
from gaisnet.tiers.device.device import Device
from gaisnet.transport.base import Link

_LOOK_S = 2.0
_LOOK_AT_CLOUD_S = 60.0  # many devices do; also looked at when the edge has another version
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndpointSettings:
    """Admission of callers, and routing of their requests.

    Attributes:
        address: Address to listen on.
        keys: Keys of callers.
        routing: When the FM is asked.
        speculate: Whether the DM drafts for the FM, unless a request says otherwise.
    """

    address: tuple[str, int]
    keys: ApiKeys
    routing: RoutingSettings
    speculate: bool = False


@dataclass(frozen=True)
class _Versions:
    """Active adapters, each as name@version."""

    edge: tuple[str, ...] = ()
    cloud: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join((*self.edge, *self.cloud))


class HttpEndpoint:
    """Answers callers on a device, as soon as it has a model.

    When its edge or the cloud serves another version, it calibrates confidence again.

    Args:
        device: The tier.
        link: The link to its edge.
        site: Its kit.
        folder: The kit's folder; thresholds and the address are written there.
        endpoint: How callers are admitted.
        compute_lock: The machine's lock.

    Raises:
        ConfigError: The address is not available.
    """

    def __init__(
        self,
        device: Device,
        link: Link,
        site: Site,
        folder: Path,
        endpoint: EndpointSettings,
        compute_lock: ComputeLock,
    ) -> None:
        self._tier = device
        self._domain = site.edge.domain
        self._adapter = site.edge.adapter
        self._bodies = LinkedBodies({self._domain: link}, site.config.faults.step_deadline_s)
        self._relay = site.config.relay.enabled
        self._settings = site.config.front
        self._merged = site.config.num_learning > 1
        self._folder = folder
        self._endpoint = endpoint
        self._compute_lock = compute_lock
        self._socket = listen(*endpoint.address)
        self._seen = _Versions()  # that the threshold is for
        self._last = _Versions()  # at the last look
        self._looked_at_cloud = -_LOOK_AT_CLOUD_S
        self._told = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="http endpoint", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish requests in progress, and accept no more."""
        self._ending.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            device = self._device()
            if device is None:
                self._socket.close()
                return
            answering = device.answering(
                self._endpoint.routing, read_calibrations(self._folder), self._endpoint.speculate
            )
            with ExitStack() as opened:
                app = make_app(answering, self._settings, self._endpoint.keys, {})
                server = Server(app, *self._endpoint.address, self._endpoint.keys, self._socket, self._settings)
                url = opened.enter_context(server.in_thread())
                opened.enter_context(publish_address(self._folder, url))
                _log.info("serving %s at %s/v1", ", ".join(answering.models), url)
                while not self._ending.wait(_LOOK_S):
                    self._keep_calibrated(device, answering)
        except Exception:
            _log.exception("the HTTP endpoint is closed; training goes on")

    def _device(self) -> AnsweringDevice | None:
        """Return the device when it is ready to write; None if it ends before it has a model."""
        while not self._ending.wait(_LOOK_S):
            try:
                parts = DeviceParts(*self._tier.decoder_parts(), self._compute_lock)
            except UnexpectedMessage:  # the edge has not given it a model yet
                continue
            adapters = ("relay", "domain") if self._relay else ("domain",)
            domain = ServedDomain(adapters, (self._adapter,), calibration_examples(self._tier.test_tokens))
            domains = {self._domain: domain}  # no other device's examples come here
            return AnsweringDevice(self._domain, parts, self._tier.tokenizer, self._bodies, domains, self._merged)
        return None

    def _keep_calibrated(self, device: AnsweringDevice, answering: Answering) -> None:
        """Calibrate again when other versions are served than those of the threshold."""
        if self._endpoint.routing.escalate != "auto" or self._endpoint.routing.threshold is not None:
            return
        try:
            versions = self._versions(device)
            settled, self._last = versions == self._last, versions  # edge and cloud change one after the other
            if versions == self._seen or not settled:
                return
            calibration = device.calibration(self._domain, self._endpoint.routing)
        except GaisnetError as error:  # the edge or the cloud is away, or has nothing to serve yet
            if self._told != str(error):
                _log.info("not calibrated now: %s", error)
            self._told = str(error)
            return
        found = {self._domain: calibration}
        answering.route(self._domain, device.routing(self._domain, self._endpoint.routing, found))
        self._seen = versions
        self._told = ""
        _log.info("calibrated on %s: %s", versions, calibration.model_dump_json())
        try:
            write_calibrations(self._folder, found)
        except OutputNotWritable as error:  # it holds as long as this process; a later one calibrates again
            _log.warning("%s", error)

    def _versions(self, device: AnsweringDevice) -> _Versions:
        """Return the adapters on the DM, and on the FM to which it escalates."""
        edge, cloud, now = self._acting(device, device.target(self._domain)), self._last.cloud, time.monotonic()
        if edge != self._last.edge or now - self._looked_at_cloud >= _LOOK_AT_CLOUD_S:
            cloud = self._acting(device, device.escalation(self._domain, self._endpoint.routing))
            self._looked_at_cloud = now
        return _Versions(edge, cloud)

    def _acting(self, device: AnsweringDevice, target: Target) -> tuple[str, ...]:
        session = self._bodies.open_session(target, device.parts.first, device.parts.stop, 0)
        session.close()
        return session.versions
