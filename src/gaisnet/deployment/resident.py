"""The resident processes: ``gaisnet cloud``, ``gaisnet edge`` and ``gaisnet device``, each around one tier.

They hold models and state. The tier code is the same as in one process, over links of gRPC.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import JsonValue

from gaisnet.checkpoint import FolderStore
from gaisnet.config import Config
from gaisnet.config.hosts import every_address
from gaisnet.data.devices import load_device, load_public_inputs, load_public_task
from gaisnet.data.examples import has_images
from gaisnet.deployment.outcome import recorded
from gaisnet.deployment.site import CLOUD, Site, certificates, claimed, read_site
from gaisnet.deployment.site_hosting import SiteService
from gaisnet.deployment.validity import check_validity
from gaisnet.engines.body_hosting import PeerRouter
from gaisnet.engines.local_serving import compute_lock_for
from gaisnet.engines.nvflare.job import JobKeeper
from gaisnet.engines.nvflare.kit import ORDERS
from gaisnet.errors import ConfigError, UnexpectedMessage
from gaisnet.messages import BodyRequest, Message, SmashedData
from gaisnet.models.foundation import Foundation, read_tokenizer
from gaisnet.network import Network
from gaisnet.progress import Progress
from gaisnet.runs.output import RunFolder
from gaisnet.runs.run import carry_out
from gaisnet.runs.summary import Summary
from gaisnet.serving.engine.endpoint import SessionEndpoint
from gaisnet.serving.engine.escalation import EdgeSessions
from gaisnet.tiers.cloud.cloud import Cloud
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.edge.edge import Edge
from gaisnet.transport.base import Handler, Link
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import CodedLink
from gaisnet.transport.courier import Depots
from gaisnet.transport.grpc.dialer import Dialer
from gaisnet.transport.grpc.listener import Listener
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.stream import ByteLink, Limits, LinkState

if TYPE_CHECKING:
    from gaisnet.deployment.http_endpoint import EndpointSettings

_START_S = 600.0  # more than a tier needs to be ready once its links are
_ENDED_BY_SIGNAL = 128 + signal.SIGTERM
_log = logging.getLogger(__name__)


class Watched:
    """Progress that can be queried, and logs every stage.

    Attributes:
        notice: A sentence for the operator, such as that a certificate expires; "" for none.
    """

    def __init__(self) -> None:
        self._last: dict[str, JsonValue] = {"stage": "ready", "done": 1, "total": 1, "figures": {}}
        self._cycle: tuple[Callable[[], int], int] | None = None
        self.notice = ""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """See ``gaisnet.progress.Progress``."""
        if stage != self._last["stage"] or done in (0, total):
            _log.info("%s %d/%d %s", stage, done, total, "  ".join(f"{k} {v:.3f}" for k, v in figures.items()))
        self._last = {"stage": stage, "done": done, "total": total, "figures": dict(figures)}

    def count(self, finished: Callable[[], int], cycles: int) -> None:
        """Set the present cycle: ``finished`` and one more, of ``cycles``."""
        self._cycle = finished, cycles

    def describe(self) -> dict[str, JsonValue]:
        """Return the last report, and the site's notice."""
        told: dict[str, JsonValue] = {**self._last, "notice": self.notice}
        if self._cycle is None:
            return told
        finished, cycles = self._cycle
        return {**told, "cycle": min(finished() + 1, cycles), "cycles": cycles}


class _Answers:
    """Bytes in, bytes out, for handlers that exist only after their links do.

    Args:
        codec: Decodes requests and encodes replies.
        takes: Returns whether a site may ask at all, before anything of its request is read.
        about: Returns whether it may send this message.
        most_bytes: Longest request of a site; see ``Depots``.
    """

    def __init__(
        self,
        codec: Codec,
        takes: Callable[[str], bool] = lambda _: True,
        about: Callable[[str, Message], bool] = lambda *_: True,
        most_bytes: Callable[[str], int | None] = lambda _: None,
    ) -> None:
        self._depots = Depots(codec, most_bytes)
        self._takes = takes
        self._about = about
        self._for: Future[Callable[[str], Handler]] = Future()

    def become(self, handler_for: Callable[[str], Handler]) -> None:
        """Set the function that returns the handler for an asker."""
        self._for.set_result(handler_for)

    def __call__(self, asker: str, frame: bytes) -> bytes | Future[bytes]:
        """Answer a frame, now or later. Raises ``UnexpectedMessage`` where ``asker`` may not send it."""
        if not self._takes(asker):
            raise UnexpectedMessage("this site", f"request from '{asker}'")
        return self._depots.depot_for(asker).answer(frame, lambda message: self._handle(asker, message))

    def _handle(self, asker: str, message: Message) -> Message | Future[Message]:
        if not self._about(asker, message):
            raise UnexpectedMessage("this site", f"{type(message).__name__} of this kind from '{asker}'")
        return self._for.result(_START_S)(asker).handle(message)


def run_cloud(folder: Path, out: Path | None = None, stay: bool = False) -> Summary:
    """Carry out the rest of a cloud kit's run, and return. Raises ``GaisnetError``.

    Args:
        folder: The kit.
        out: Output folder; None for one in the kit.
        stay: Whether to go on answering after the run, until the process is ended.
    """
    site = read_site(folder, CLOUD)
    config = site.config
    public, inputs = {edge.domain: load_public_task(edge, config) for edge in config.edges}, load_public_inputs(config)
    watched = Watched()
    with ExitStack() as opened:
        opened.enter_context(claimed(folder))
        service = SiteService(config.service, config.faults.away_s)
        opened.callback(service.close)
        output = out or folder / "run"
        with recorded(folder, output), RunFolder.claim(output) as run_folder, ExitStack() as ends_with_run:
            _check_certificate(folder, site, watched)
            keeper = JobKeeper(folder / "admin", [edge.name for edge in config.edges])
            ends_with_run.callback(keeper.close)
            keeper.start()

            def build(foundation: Foundation, text: str, progress: Progress) -> Network:
                shapes = {name: one.task for name, one in public.items()}
                cloud = Cloud(foundation, config, shapes, text, progress, service.publisher, inputs)
                return _cloud_network(site, folder, cloud, service, watched, keeper, opened)

            majorities = {name: one.majority for name, one in public.items()}
            summary = carry_out(config, run_folder, watched, build, majorities)
        if stay:
            watched("finished", config.cycles, config.cycles, {})
            _log.info("the run has finished; answering until this process is ended")
            _until_ended()
        return summary


def _cloud_network(
    site: Site,
    folder: Path,
    cloud: Cloud,
    service: SiteService,
    watched: Watched,
    keeper: JobKeeper,
    opened: ExitStack,
) -> Network:
    config, codec, ledger = site.config, Codec(site.config.wire), Ledger()
    names = [edge.name for edge in config.edges]
    owners = {edge.name: {device.name for device in edge.devices} for edge in config.edges}

    def own(edge: str, message: Message) -> bool:
        """Return whether an edge speaks of its own devices only."""
        return not isinstance(message, SmashedData | BodyRequest) or message.owner in owners[edge]

    answers = _Answers(codec, takes=owners.__contains__, about=own)
    listener = Listener(
        every_address(config.cloud.host, config.cloud.link_port),
        certificates(folder, "cloud"),
        CLOUD,
        [*names, *(ORDERS + name for name in names)],
        answers,
        _limits(config),
        lambda: {**watched.describe(), "job": keeper.describe(), "links": links_status(listener.states())},
    )
    opened.callback(listener.close)
    share = config.service.share_of_one(len(names))
    routers = {name: _router_of_edge(service, cloud, name, listener.link(name), share) for name in names}
    answers.become(routers.__getitem__)
    links = {
        edge.domain: CodedLink(listener.link(ORDERS + edge.name), codec, ledger, "edge_cloud", "down", edge.name)
        for edge in config.edges
    }
    network = Network(cloud, links, ledger, config.faults)
    watched.count(lambda: network.cycle, config.cycles)
    return network


def _router_of_edge(service: SiteService, cloud: Cloud, name: str, link: ByteLink, share: float) -> PeerRouter:
    return service.add_router(cloud, name, lambda: link.peer, lambda body: SessionEndpoint(body, name, share))


def run_edge(folder: Path) -> NoReturn:
    """Serve an edge's kit until the process is ended. Raises ``GaisnetError``."""
    site = read_site(folder, "edge")
    config, settings, codec, ledger = site.config, site.edge, Codec(site.config.wire), Ledger()
    own, limits = certificates(folder, "edge"), _limits(config)
    names = [device.name for device in settings.devices]
    of_device = dict.fromkeys(names, _limits_of_device(config).max_dialer_bytes)  # in chunks or not
    answers, watched = _Answers(codec, takes={site.name, *names}.__contains__, most_bytes=of_device.get), Watched()
    with claimed(folder), recorded(folder), ExitStack() as opened:
        _check_certificate(folder, site, watched)
        service = SiteService(config.service, config.faults.away_s)
        opened.callback(service.close)
        to_cloud = Dialer(site.cloud_address, own, site.name, CLOUD, _nothing_to_ask, limits)
        opened.callback(to_cloud.close)
        listener = Listener(
            every_address(settings.host, settings.link_port),
            own,
            site.name,
            [*names, site.name],
            answers,
            limits,
            lambda: {**watched.describe(), "links": links_status({**listener.states(), CLOUD: to_cloud.state()})},
            aside=names,  # answers do not wait for an order, which takes a whole round
            limits_aside=_limits_of_device(config),
        )
        opened.callback(listener.close)
        devices = {name: CodedLink(listener.link(name), codec, ledger, "device_edge", "down", name) for name in names}
        store = FolderStore(folder / "state")
        cloud = CodedLink(to_cloud, codec, ledger, "edge_cloud", "up", CLOUD, store.arrivals)
        edge = Edge(settings, config, cloud, devices, ledger, store, watched, service.publisher)
        # Orders come from the cloud, by way of this host's own NVFlare process; devices may ask for answers only.
        # The bytes of answers are not those of a run.
        asked = CodedLink(to_cloud, codec, Ledger(), "edge_cloud", "up", CLOUD)
        quota = config.service.share_of_one(len(names)), config.service.max_sessions_per_peer
        routers = {name: _router_of_device(service, asked, name, listener.link(name), quota) for name in names}
        answers.become(lambda asker: routers.get(asker, edge))
        _until_ended()


def _router_of_device(
    service: SiteService, cloud: Link, name: str, link: ByteLink, quota: tuple[float, int]
) -> PeerRouter:
    return service.add_router(None, name, lambda: link.peer, lambda body: EdgeSessions(body, cloud, name, *quota))


def run_device(folder: Path, endpoint: "EndpointSettings | None" = None) -> NoReturn:
    """Serve a device's kit until the process is ended. Raises ``GaisnetError``.

    Args:
        folder: The kit.
        endpoint: Lets callers on the device ask the network; None for a device that only trains.
    """
    site = read_site(folder, "device")
    with ExitStack() as held:
        if os.access(folder, os.W_OK):  # it keeps nothing, so its kit may lie where nobody writes
            held.enter_context(claimed(folder))
        held.enter_context(recorded(folder))
        _serve_device(folder, site, endpoint)


def _serve_device(folder: Path, site: Site, endpoint: "EndpointSettings | None") -> NoReturn:
    config, codec, watched = site.config, Codec(site.config.wire), Watched()
    answers = _Answers(codec)
    compute_lock = compute_lock_for(config.service)
    data, learns = load_device(config, site.name), site.edge.follows is None
    tokenizer = None if has_images(data) else read_tokenizer(folder / "tokenizer")
    device = Device(site.device, config, tokenizer, data, watched, compute_lock, trains=learns, labels=site.edge.labels)
    if endpoint is not None and not device.generates_text:
        found = "its examples have labels, and a model that classifies writes no text"
        raise ConfigError(f"answers of device '{site.name}'", found, "start it without --serve")
    answers.become(lambda _: device)
    with ExitStack() as opened:
        _check_certificate(folder, site, watched)
        own = certificates(folder, "device")
        link = Dialer(site.edge_address, own, site.name, site.edge.name, answers, _limits_of_device(config))
        opened.callback(link.close)
        if endpoint is not None:
            from gaisnet.deployment.http_endpoint import HttpEndpoint  # it needs packages that only answering needs

            to_edge = CodedLink(link, codec, Ledger(), "device_edge", "up", site.edge.name)
            opened.callback(HttpEndpoint(device, to_edge, site, folder, endpoint, compute_lock).close)
        _until_ended()


def _check_certificate(folder: Path, site: Site, watched: Watched) -> None:
    """Warn if the certificate expires soon. Raises ``CertificateInvalid``."""
    watched.notice = check_validity(folder, site.role).warning(datetime.now(UTC))
    if watched.notice:
        _log.warning("%s", watched.notice)


def end_in_order() -> None:
    """Let SIGTERM end this process like Ctrl-C: links are closed, locks released. Its work is not finished, though."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_ENDED_BY_SIGNAL))


def _until_ended() -> NoReturn:
    while True:
        threading.Event().wait(3600.0)


def _nothing_to_ask(asker: str, _frame: bytes) -> bytes:
    raise UnexpectedMessage("an edge", f"request from '{asker}' on the stream that it dialled")


def _limits(config: Config) -> Limits:
    return Limits(max_message_bytes=min(config.wire.max_message_bytes, Limits.max_message_bytes))


def _limits_of_device(config: Config) -> Limits:
    """Return limits for the link of a device: its requests are rows of answers, and short; its examples are replies."""
    return replace(_limits(config), max_dialer_bytes=config.service.max_request_mib * 2**20)


def links_status(states: Mapping[str, LinkState]) -> dict[str, JsonValue]:
    """Return the links' part of a site's status."""
    return {name: asdict(state) for name, state in states.items()}
