"""A front door on a tiny model: real bodies, a real server, and OpenAI's own client."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from gaisnet.config import FrontSettings, ServiceSettings
from gaisnet.errors import LinkLost
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.generation.answering import Answering, Domain
from gaisnet.serving.generation.decoding import BodySession, DeviceParts
from gaisnet.serving.generation.routing import EscalatingSession, Routing, Target
from gaisnet.serving.http.api import make_app
from gaisnet.serving.http.callers import ApiKeys
from gaisnet.serving.http.server import Server
from tests.serving.models import DOMAIN, RELAY, LocalSession, adapter, domain_body, lively_model, served
from tests.tiny import NUM_LAYERS, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('begin with a user') }}"
    "{% endif %}<s>{{ m.role[0] }}:{{ m.content }}{% endfor %}<s>a:"
)


class LocalBodies:
    """Services of this process, and what may go wrong with them.

    ``cloud_away`` lets everything that goes to the FM fail. ``trouble`` is what sessions that open from then on do
    after some calls: they are lost, or wait until they are closed.
    """

    def __init__(self, edges: dict[str, BodyService], cloud: BodyService) -> None:
        self.edges = edges
        self.cloud = cloud
        self.cloud_away = False
        self.trouble: tuple[str, int] | None = None
        self.opened: list[Target] = []

    def open_session(self, target: Target, first: int, stop: int, num_positions: int) -> BodySession:
        if target.body == "cloud" and self.cloud_away:
            raise LinkLost("cloud at 10.1.2.3", "it is away")
        service = self.cloud if target.body == "cloud" else self.edges[target.domain]
        session = LocalSession(service, first, stop, target.adapters, num_positions)
        self.opened.append(target)
        return session if self.trouble is None else TroubledSession(session, *self.trouble)

    def open_escalating_session(self, target: Target, first: int, stop: int, num_positions: int) -> EscalatingSession:
        return LocalEscalating(self, target, first, stop, num_positions)

    @property
    def services(self) -> list[BodyService]:
        return [*self.edges.values(), self.cloud]

    @property
    def num_sessions(self) -> int:
        return sum(service.num_sessions for service in self.services)

    def wait_until_free(self) -> None:
        """Until all sessions have ended."""
        until(lambda: not self.num_sessions)


class TroubledSession:
    """After some calls it is lost, or waits until it is closed."""

    def __init__(self, session: LocalSession, trouble: str, num_calls: int) -> None:
        self._session = session
        self._trouble = trouble
        self._left = num_calls
        self._closed = threading.Event()

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        self._left -= 1
        if self._left < 0 and self._trouble == "lost":
            raise LinkLost("edge at 10.1.2.3", "it restarted")
        if self._left < 0:
            assert self._closed.wait(60)
        return self._session.extend(rows_TD, want)

    def crop(self, length: int) -> None:
        self._session.crop(length)

    def close(self) -> None:
        self._session.close()
        self._closed.set()


class LocalEscalating:
    """Keeps the rows that it gets, as an edge does."""

    def __init__(self, bodies: LocalBodies, target: Target, first: int, stop: int, num_positions: int) -> None:
        self._bodies = bodies
        self._domain = target.domain
        self._span = first, stop, num_positions
        self._session = bodies.open_session(target, *self._span)
        self._rows: list[Tensor] = []

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        self._rows.append(rows_TD)
        return self._session.extend(rows_TD, want)

    def crop(self, length: int) -> None:
        self._rows = [torch.cat(self._rows)[:length]]
        self._session.crop(length)

    def close(self) -> None:
        self._session.close()

    def escalate(self, adapters: tuple[str, ...], want: int) -> Tensor:
        at_cloud = self._bodies.open_session(Target("cloud", adapters, self._domain), *self._span)
        rows_WD = at_cloud.extend(torch.cat(self._rows), want)
        self._session.close()
        self._session = at_cloud
        return rows_WD


def until(condition: Callable[[], bool]) -> None:
    """Wait for what will come; the test's own time limit ends it if it does not."""
    while not condition():
        time.sleep(0.002)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


adapter_tensors = cache(adapter)


@cache
def tiny_parts(tail_layers: int = 0) -> tuple[DeviceParts, dict[str, BodyService], BodyService]:
    """For tests that use them one after the other."""
    parts, bodies = tiny_bodies(tail_layers=tail_layers)
    return parts, bodies.edges, bodies.cloud


def shared_bodies(tail_layers: int = 0) -> tuple[DeviceParts, LocalBodies]:
    """The same services for all such tests, with nothing wrong with them yet."""
    parts, edges, cloud = tiny_parts(tail_layers)
    return parts, LocalBodies(dict(edges), cloud)


def tiny_bodies(
    settings: ServiceSettings | None = None, tail_layers: int = 0, precision: str = "int8"
) -> tuple[DeviceParts, LocalBodies]:
    """An FM, and DMs of it at two edges that have learned different things; nothing with layers in the tail.

    In int8 an answer written beside others may differ from one written alone: beside other rows the last bit of a
    float32 sum may be another one, which int8 can make a step of 1/63.
    """
    settings = settings or ServiceSettings()
    model = lively_model()
    parts, cloud = served(model, CutLayers(1, tail_layers), settings)
    edges = {}
    for seed, name in enumerate(("shapes", "tastes")):
        body = domain_body(lively_model(), 1, (0, 1, 3, 4, 5), precision)
        edges[name] = BodyService(body, range(1, NUM_LAYERS), settings)
        if tail_layers:
            continue
        edges[name].install_adapter(
            "relay", 0, RELAY_KEPT, {k: t for k, t in adapter_tensors(RELAY, 7).items() if ".2." not in k}
        )
        for service, known in ((edges[name], "domain"), (cloud, name)):
            service.install_adapter(known, 0, DOMAIN, adapter_tensors(DOMAIN, 20 + seed))
    if not tail_layers:
        cloud.install_adapter("merged", 0, DOMAIN, adapter_tensors(DOMAIN, 30))
    return parts, LocalBodies(edges, cloud)


RELAY_KEPT = type(RELAY)(RELAY.rank, RELAY.alpha, RELAY.targets, (1, 3))


@dataclass
class RunningServer:
    """A server that is up, and what it stands on."""

    url: str
    bodies: LocalBodies
    answering: Answering


@contextmanager
def running_server(
    threshold: float = 0.5,
    policy: Any = "auto",
    settings: FrontSettings | None = None,
    keys: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
    service: ServiceSettings | None = None,
    speculate: bool = False,
) -> Iterator[RunningServer]:
    parts, bodies = tiny_bodies(service, precision="float32")
    domains = {name: Domain(Routing((name,), policy, threshold)) for name in bodies.edges}
    answering = Answering(parts, tokenizer or chat_tokenizer(), bodies, domains, "shapes", speculate)
    gauges = {"sessions": lambda: float(bodies.num_sessions)}
    app = make_app(answering, settings or FrontSettings(), ApiKeys(keys), gauges)
    with ExitStack() as stack:
        for each in bodies.services:
            stack.enter_context(each.serving())
        url = stack.enter_context(Server(app, "127.0.0.1", 0, ApiKeys(keys)).in_thread())
        yield RunningServer(url, bodies, answering)
