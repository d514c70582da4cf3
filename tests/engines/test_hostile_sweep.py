"""Every field of every message, set to values that nobody can mean, where the message arrives.

A value is legitimate there or refused by an error of our own: never another exception, which would end the process of
an honest party. Messages and fields are looked up, so a new one is swept as soon as it has an example below.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from gaisnet.config import FaultSettings
from gaisnet.engines.local import NoPublishers, Tiers, build_tiers
from gaisnet.errors import GaisnetError
from gaisnet.futures import as_future
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import (
    AdapterUpdate,
    AnchorRequest,
    BodyOutput,
    BodyOutputGrad,
    BodyRequest,
    ChunkRequest,
    CloseSession,
    CropSession,
    Done,
    EscalateSession,
    Evaluate,
    EvaluateGuest,
    EvaluationReport,
    ExtendSession,
    FineTune,
    Install,
    Installed,
    LabelRequest,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    ModelRequest,
    OpenSession,
    Parcel,
    ParcelSent,
    ParcelTaken,
    SessionOpened,
    SessionRows,
    Shared,
    ShareRequest,
    SmashedData,
    SmashRequest,
    TrafficReport,
    TrafficRequest,
    Wanted,
)
from gaisnet.models.parts import CutLayers
from gaisnet.serving.engine.endpoint import RemoteSession, SessionEndpoint
from gaisnet.tiers.edge.activation_store import ActivationStore
from gaisnet.tiers.edge.device_pool import DevicePool
from gaisnet.tiers.split.step import check_reply
from gaisnet.transport.arrivals import Arrivals
from gaisnet.transport.codec import Codec
from gaisnet.transport.courier import Courier, Depot, Depots
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.parcels import Wrapper
from tests.engines.test_local_network import PUBLIC_TEXT, WEIGHTS
from tests.serving.models import lively_model, served
from tests.tiny import tiny_config, tiny_data, tiny_edge, tiny_foundation

pytestmark = pytest.mark.integration

NUMBERS: tuple[Any, ...] = (0, -1, 2**31, 2**63, 10**400, float("nan"), float("inf"), 1e308)
TEXTS: tuple[Any, ...] = ("", "x" * 100_000, "\x1b[2J", 0, None)
OWNER, DOMAIN = "north-a", "shapes"
Take = Callable[[Message], object]
WIRE = {"smashed": "float32", "body_output": "float32", "gradient": "float32"}
CODEC = Codec(tiny_config(wire=WIRE).wire)
IN_CHUNKS = Codec(tiny_config(wire={**WIRE, "max_message_bytes": 2**16}).wire)


def _ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


@dataclass
class Case:
    """An honest message, and who takes it."""

    message: Message
    takers: Mapping[str, Take]


class World:
    """A network in which an evaluation is over, so that everybody has what belongs to a run."""

    def __init__(self) -> None:
        edge = tiny_edge("north", DOMAIN, travelling="a")
        last_mile = {"epochs": 1, "learning_rate": 1e-4}
        config = tiny_config(
            edges=[edge],
            fine_tune={"local_epochs": 1, "batch_size": 8},
            absorb={"last_mile": last_mile, "retention_windows": 2, "retention_tokens": 16},
        )
        shapes = {each.domain: TaskTemplate(each.template, each.labels) for each in config.edges}
        foundation = tiny_foundation(initializer_range=WEIGHTS)
        self.config = config
        self.tiers: Tiers = build_tiers(
            config, foundation, shapes, tiny_data(config, 2, 2), PUBLIC_TEXT, lambda *_: None, Ledger, NoPublishers()
        )
        network = self.tiers.network
        network.install()
        network.evaluate()
        network.edges.request_activations()
        parts, self.service = served(lively_model(), CutLayers(1, 1))
        self.parts = parts
        self.sessions = SessionEndpoint(self.service, OWNER)
        self.long = SmashedData(OWNER, "train", 1, _ints(800), _ints(1), torch.ones(800, 32))  # takes two chunks
        wrapper = Wrapper(IN_CHUNKS, OWNER)
        self.parcel = wrapper.wrap(self.long, wrapper.hold(self.long, IN_CHUNKS.pack(self.long)))
        self.cases = {type(case.message): case for case in self._cases()}

    # -- who takes what ------------------------------------------------------------------------------------------------

    def device(self, name: str) -> Take:
        return self.tiers.devices[name].handle

    @property
    def edge(self) -> Any:
        return self.tiers.edges[DOMAIN]

    def of_edge(self, asked: Message) -> Take:
        """The cloud, which asked the edge."""
        return lambda reply: self.tiers.cloud.check_reply(DOMAIN, asked, reply)

    def fetched(self, reply: Message) -> object:
        """The edge, which asked a device for activations."""
        held, settings = self.edge._state, self.config.edges[0]
        asked = type("Asked", (), {"ask_devices": lambda *_: {OWNER: reply}})
        store = ActivationStore(settings, FaultSettings(), cast(DevicePool, asked()))
        store.reset_for_run(held.hidden_size, False, held.max_positions)
        return _raised(store.fetch_activations([OWNER], "train").get(OWNER))

    def alone(self, reply: Message) -> object:
        """The edge, which asked a local device to learn."""
        learning, start = self.edge._learning, self.edge._state.domain_release()
        asked = type("Asked", (), {"collect_replies": lambda *_: {"north-c": reply}})
        own, learning._device_pool = learning._device_pool, asked()
        try:
            failed: dict[str, GaisnetError] = {}
            learning._collect_local(None, start, 0, failed)
            return _raised(failed.get("north-c"))
        finally:
            learning._device_pool = own

    def stepped(self, reply: Message) -> object:
        """The edge, which asked for a gradient."""
        output = BodyOutput("train", 7, 4, _ints(0), torch.randn(3, 32))
        return _raised(check_reply(cast(Any, reply), output, OWNER, "here", self.edge._domain().gradient_bounds))

    def reported(self, reply: Message) -> object:
        self.edge._ensure_activations([OWNER], "test")  # an order to install another run may have come before
        return self.edge._check_report(OWNER, reply, "test")

    def session(self, message: Message) -> object:
        """A body service."""
        return as_future(self.sessions.handle(message)).result(timeout=60)

    def opened(self, reply: Message) -> object:
        """A device, which asked for a session."""
        return RemoteSession(lambda _: reply, self.parts.first, self.parts.stop, ())

    def rows(self, reply: Message) -> object:
        """A device, which asked for rows."""
        opened = SessionOpened("s")
        session = RemoteSession(lambda m: opened if isinstance(m, OpenSession) else reply, 1, 5, ())
        return session.send(torch.zeros(1, 32), 1).result(timeout=60)

    def told(self, reply: Message) -> object:
        """The edge, which asked a device how long its examples are."""
        pool, edge = self.edge._device_pool, self.edge
        asked = type("Asked", (), {"ensure_ready": lambda *_: {}, "ask_devices": lambda *_: {OWNER: reply}})
        edge._device_pool = asked()
        try:
            return edge._collect_lengths()
        finally:
            edge._device_pool = pool

    # -- parcels -------------------------------------------------------------------------------------------------------

    def at_depot(self, *before: Message) -> Take:
        """An end that answers, after some messages."""

        def take(message: Message) -> object:
            depot: Depot = Depots(IN_CHUNKS).depot_for(OWNER)
            for each in (*before, message):
                answer = depot.answer(IN_CHUNKS.encode(each), lambda _: self.long)
            return answer

        return take

    def pushed(self, reply: Message) -> object:
        """An end that offers a parcel."""
        return self._courier(lambda message: reply if isinstance(message, Parcel) else Done()).deliver(self.parcel)

    def pulled(self, reply: Message) -> object:
        """An end that pulls a parcel, of which the first chunk is as it should be."""

        def ask(message: Message) -> Message:
            if isinstance(message, ChunkRequest):
                return reply if message.index else self.parcel.chunk(0)
            return Done()

        return self._courier(ask).fetch(self.parcel.offer)

    def _courier(self, ask: Callable[[Message], Message]) -> Courier:
        return Courier(IN_CHUNKS, Arrivals(IN_CHUNKS, OWNER), OWNER, ask)

    def _parcels(self) -> Iterator[Case]:
        offer, chunks = self.parcel.offer, (self.parcel.chunk(0), self.parcel.chunk(1))
        yield Case(offer, {"depot": self.at_depot()})
        yield Case(chunks[1], {"depot": self.at_depot(offer, chunks[0]), "asker": self.pulled})
        yield Case(ParcelSent(offer.digest), {"depot": self.at_depot(offer, *chunks)})
        yield Case(ChunkRequest(offer.digest, 1), {"depot": self.at_depot(ModelRequest())})
        yield Case(ParcelTaken(offer.digest), {"depot": self.at_depot(ModelRequest())})
        yield Case(Wanted(1), {"asker": self.pushed})

    def _cases(self) -> Iterator[Case]:
        cloud, edge, device, local = self.tiers.cloud, self.edge, self.device(OWNER), self.device("north-c")
        domain = cloud.adapter_release("domain", DOMAIN)
        rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        session = cast(SessionOpened, self.session(OpenSession(1, 5, (), 8))).session
        tensors = domain.tensors
        yield Case(Done(), {})
        yield Case(Install(self.tiers.network.run, cloud.model_digest), {"edge": edge.handle})
        yield Case(Installed(0, 0), {"cloud": self.of_edge(Install("", ""))})
        yield Case(ModelRequest(), {"cloud": cloud.handle})
        yield Case(AnchorRequest(), {"cloud": cloud.handle})
        yield Case(cloud.model_release, {"device": local})
        yield Case(domain, {"edge": edge.handle, "device": local})
        yield Case(cloud.anchor_release, {"device": local})
        update = AdapterUpdate(1, 0, 2, 1, 3.0, (), tensors)
        yield Case(update, {"edge": self.alone, "cloud": self.of_edge(FineTune(0))})
        yield Case(SmashRequest("train"), {"device": device})
        smashed = SmashedData(OWNER, "train", 1, _ints(3), _ints(1), rows)
        yield Case(smashed, {"edge": self.fetched, "cloud": cloud.handle})
        sent = cast(SmashedData, device(SmashRequest("train")))
        num_labels = int(sent.num_labels_E[0])
        yield Case(BodyOutput("train", 0, num_labels, _ints(0), torch.randn(num_labels, 32)), {"device": device})
        yield Case(BodyOutputGrad(7, 2.0, rows * 0.1), {"edge": self.stepped})
        report = edge._evaluate(lambda name: edge._domain_output(name, "test"), "test")
        yield Case(
            EvaluationReport(2, 1, report.num_tokens // 3, 5.0),
            {"edge": self.reported, "cloud": self.of_edge(Evaluate("domain", None))},
        )
        yield Case(FineTune(0), {"edge": edge.handle, "device": local})
        yield Case(Evaluate("domain", None), {"edge": edge.handle})
        yield Case(EvaluateGuest(cloud.relay(DOMAIN), tensors), {"edge": edge.handle})
        yield Case(TrafficRequest(), {"edge": edge.handle})
        yield Case(TrafficReport(1, 2, 3, 4), {"cloud": self.of_edge(TrafficRequest())})
        yield Case(BodyRequest(OWNER, DOMAIN), {"cloud": cloud.handle})
        yield Case(ShareRequest(), {"edge": edge.handle})
        yield Case(Shared((OWNER,)), {"cloud": self.of_edge(ShareRequest())})
        yield Case(LabelRequest(OWNER, 0, num_labels, _ints(0), torch.randn(num_labels, 32)), {"edge": edge.handle})
        yield Case(OpenSession(1, 5, (), 8), {"body": self.session})
        yield Case(SessionOpened(session), {"device": self.opened})
        yield Case(ExtendSession(session, 0, 1, rows), {"body": self.session})
        yield Case(SessionRows(rows[:1]), {"device": self.rows})
        yield Case(EscalateSession(session, (), 1), {"body": self.session})
        yield Case(CropSession(session, 0), {"body": self.session})
        yield Case(CloseSession("none"), {"body": self.session})
        yield Case(LengthsRequest(), {"edge": edge.handle, "device": device})
        yield Case(Lengths(4, 0, 30), {"edge": self.told})
        yield Case(LengthsOfDevices((OWNER,), ((4, 0, 30),)), {"cloud": self.of_edge(LengthsRequest())})
        yield from self._parcels()


def _raised(error: object) -> object:
    if isinstance(error, Exception):
        raise error
    return error


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    made = World()
    with made.service.serving():
        yield made


# -- values ------------------------------------------------------------------------------------------------------------


def _tensors(value: Tensor) -> Iterator[Tensor]:
    """Numbers that nobody can mean, no numbers, and other shapes and dtypes."""
    whole = (0, 255) if value.dtype == torch.uint8 else (0, -1, 2**31 - 1)
    numbers = (0, -1, float("nan"), float("inf"), 3e38) if value.is_floating_point() else whole
    for number in numbers:
        yield torch.full_like(value, number)
        if value.numel():
            one = value.clone()
            one.view(-1)[-1] = number
            yield one
    yield value[:0]
    yield value.flatten()[:1]
    yield value[None]
    yield value.repeat(1000, *[1] * (value.ndim - 1))
    yield value.to(torch.float64 if value.is_floating_point() else torch.int64)
    yield torch.zeros(())


def hostile(value: Any) -> Iterator[Any]:
    """In place of a field's value."""
    if isinstance(value, Tensor):
        yield from _tensors(value)
    elif isinstance(value, dict):
        yield {}
        yield {**value, "more": torch.zeros(1)}
        for key in [min(value), max(value)] if value else []:
            yield {other: tensor for other, tensor in value.items() if other != key}
            yield from ({**value, key: tensor} for tensor in _tensors(value[key]))
    elif isinstance(value, tuple):
        yield from ((), list(range(100_000)), ["x" * 10_000] * 100, [value[0]] * 3 if value else [None], None)
        yield from ([number] for number in NUMBERS)
    else:
        yield from (*NUMBERS, *TEXTS, [], {})


def with_field(message: Message, name: str, value: Any) -> Message:
    """The message with a value that its own checks would refuse."""
    changed = object.__new__(type(message))
    for declared in fields(message):
        object.__setattr__(changed, declared.name, value if declared.name == name else getattr(message, declared.name))
    return changed


# -- the sweep ---------------------------------------------------------------------------------------------------------

MESSAGES = sorted(Message.__subclasses__(), key=lambda kind: kind.__name__)
QUICK = (AdapterUpdate, BodyOutputGrad, EvaluationReport, Installed, Shared, SmashedData, TrafficReport)


def _number_of(value: Any) -> str:
    return f"{type(value).__name__} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]


def sweep(world: World, kind: type[Message]) -> list[str]:
    """Values that ended in anything but an answer or an error of our own."""
    case, complaints = world.cases[kind], []
    for declared in fields(case.message):
        for value in hostile(getattr(case.message, declared.name)):
            frame = CODEC.encode(with_field(case.message, declared.name, value))
            for taker, take in case.takers.items():
                try:
                    take(CODEC.decode(frame))
                except GaisnetError:
                    continue
                except Exception as error:
                    said = f"{type(error).__name__}: {str(error)[:90]}"
                    complaints.append(f"{declared.name} = {_number_of(value)} at the {taker}: {said}")
    return complaints


def test_every_message_has_an_example(world: World) -> None:
    assert set(world.cases) == set(MESSAGES)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_an_honest_message_is_taken(world: World, kind: type[Message]) -> None:
    for taker, take in world.cases[kind].takers.items():
        if (kind, taker) not in NOT_HERE:
            take(CODEC.decode(CODEC.encode(world.cases[kind].message)))


NOT_HERE = {(EscalateSession, "body")}
"""Asked of a device's edge, which has this from nobody in these worlds."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow, id=kind.__name__) for kind in MESSAGES],
)
def test_no_value_of_any_field_ends_the_process_of_whoever_gets_it(world: World, kind: type[Message]) -> None:
    assert sweep(world, kind) == []


@pytest.mark.parametrize("kind", QUICK, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("value", [-2, 2**31, 2**63, 10**400, float("nan"), 1e308], ids=lambda v: repr(v)[:6])
def test_a_number_out_of_bounds_is_refused_in_every_field(world: World, kind: type[Message], value: float) -> None:
    case = world.cases[kind]
    for declared in fields(case.message):
        if not isinstance(getattr(case.message, declared.name), int | float):
            continue
        if kind is TrafficReport and value == 2**31:  # bytes of a long run
            continue
        frame = CODEC.encode(with_field(case.message, declared.name, value))
        for take in case.takers.values():
            with pytest.raises(GaisnetError):
                take(CODEC.decode(frame))
