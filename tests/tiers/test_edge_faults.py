"""An edge with failing devices, and an edge that restarts from its store."""

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, take_out
from gaisnet.checkpoint import FolderStore
from gaisnet.config import Config
from gaisnet.data.examples import DeviceData, Example
from gaisnet.errors import (
    CheckpointError,
    GaisnetError,
    LinkTimeout,
    OutputNotWritable,
    PeerError,
    TooFewDevices,
    UnexpectedMessage,
)
from gaisnet.messages import (
    AdapterRelease,
    AdapterUpdate,
    AnchorRelease,
    AnchorRequest,
    BodyOutput,
    BodyOutputGrad,
    Done,
    Evaluate,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Message,
    ModelRelease,
    ModelRequest,
    SmashedData,
    SmashRequest,
    TrafficReport,
    TrafficRequest,
)
from gaisnet.models.recipe import Recipe
from gaisnet.progress import Progress, silent
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.edge.edge import Edge
from gaisnet.transport.base import Link
from gaisnet.transport.codec import Codec
from gaisnet.transport.ledger import Ledger
from gaisnet.transport.local import LocalLink
from tests.tiers.cohort import ALL, EXAMPLES, Cohort, cohort_config, model_release, random_adapter
from tests.tiny import tiny_tokenizer

M = TypeVar("M", bound=Message)
Reply = Callable[[Message, Message], Message]
"""A function from a request and its future reply to a message; may raise."""

PRIVATE = {
    "split-a": EXAMPLES[:2],
    "split-b": EXAMPLES[2:3],
    "local-a": (Example("Is the moon made of cheese?", " no"), Example("Is grass green?", " yes")),
    "local-b": EXAMPLES[3:],
}
ALL_NAMES = tuple(PRIVATE)
BASE = 3  # version of the domain adapter that all begin with
RELAY = {"enabled": True, "rank": 2}


class Stopped(Exception):
    """The end of the process."""


def config_for(names: Sequence[str], edge_rounds: int = 1, batch_size: int = 2, **changes: Any) -> Config:
    heads = {"split-a": 2, "split-b": 1, "local-a": 1, "local-b": 1}
    devices = [{"name": n, "mode": n.partition("-")[0], "head_layers": heads[n]} for n in names]
    learning = {"edge_rounds": edge_rounds, "local_epochs": 2, "batch_size": batch_size, "learning_rate": 0.002}
    edges = [{"name": "edge", "domain": "facts", "devices": devices}]
    return cohort_config((), edges=edges, fine_tune={**learning, **changes.pop("fine_tune", {})}, **changes)


class Faulty:
    """A link to a device whose replies a test may change."""

    peer = "here"

    def __init__(self, link: Link) -> None:
        self._link = link
        self.asked: list[Message] = []
        self.change: Reply = lambda message, reply: reply

    def send(self, message: Message) -> Future[Message]:
        self.asked.append(message)
        answer: Future[Message] = Future()
        try:
            answer.set_result(self.change(message, self._link.send(message).result()))
        except Exception as error:
            answer.set_exception(error)
        return answer


class Releases:
    """A cloud that sends the model and its anchor, and accepts test examples."""

    peer = "here"

    def __init__(self, model: ModelRelease) -> None:
        rows_ND = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
        self._answers: dict[type[Message], Message] = {
            ModelRequest: model,
            AnchorRequest: AnchorRelease(torch.tensor([3, 4], dtype=torch.int32), rows_ND),
        }
        self.asked: list[Message] = []

    def send(self, message: Message) -> Future[Message]:
        self.asked.append(message)
        answer: Future[Message] = Future()
        answer.set_result(self._answers[type(message)])
        return answer


class World:
    """An edge with its devices and a cloud, started from a store."""

    def __init__(self, config: Config, folder: Path | None = None, progress: Progress = silent) -> None:
        self.config = config
        self.store = FolderStore(folder) if folder else None
        self.ledger = Ledger()
        self.cloud = Releases(released())
        codec = Codec(config.wire)
        self.links = {
            one.name: Faulty(
                LocalLink(
                    Device(one, config, tiny_tokenizer(), DeviceData(PRIVATE[one.name], PRIVATE[one.name])),
                    codec,
                    self.ledger,
                    "device_edge",
                    "down",
                )
            )
            for _, one in config.each_device()
        }
        self.edge = Edge(config.edges[0], config, self.cloud, self.links, self.ledger, self.store, progress)

    def installed(self, run: str = "run") -> "World":
        """Install the model and the adapters of a cloud."""
        assert self.edge.handle(Install(run, "digest")) == Installed(0, -1)
        if self.config.relay.enabled:
            self.edge.handle(AdapterRelease("relay", 1, random_tensors("relay", 6)))
        self.edge.handle(AdapterRelease("domain", BASE, random_tensors("domain", 5)))
        return self

    def fine_tune(self, cycle: int = 0) -> AdapterUpdate:
        update = self.edge.handle(FineTune(cycle))
        assert isinstance(update, AdapterUpdate)
        return update

    def score(self) -> EvaluationReport:
        report = self.edge.handle(Evaluate("domain", None))
        assert isinstance(report, EvaluationReport)
        return report

    def traffic(self) -> TrafficReport:
        report = self.edge.handle(TrafficRequest())
        assert isinstance(report, TrafficReport)
        return report

    def asked(self, kind: type[M]) -> dict[str, list[M]]:
        """Return all requests of a type to devices, by device."""
        return {name: [m for m in link.asked if isinstance(m, kind)] for name, link in self.links.items()}


@cache
def released() -> ModelRelease:
    return model_release(config_for(ALL_NAMES), Recipe(ALL, ()))


@cache
def random_tensors(role: str, seed: int) -> AdapterTensors:
    probe = Cohort(cohort_config((1, 2), relay=RELAY))
    return random_adapter(take_out(probe.body, role), seed)


@cache
def undisturbed(
    names: tuple[str, ...] = ALL_NAMES, cycle: int = 0, edge_rounds: int = 1, relay: bool = False
) -> AdapterUpdate:
    """Return the update of an edge with these devices, without failures and restarts."""
    config = config_for(names, edge_rounds, relay=RELAY if relay else {"enabled": False})
    return World(config).installed().fine_tune(cycle)


def assert_equal(found: AdapterUpdate, expected: AdapterUpdate) -> None:
    """Compare bit for bit."""
    assert replace(found, tensors={}) == replace(expected, tensors={})
    assert_same_tensors(found.tensors, expected.tensors)


def assert_same_tensors(found: AdapterTensors, expected: AdapterTensors) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def fails(kind: type[Message], error: Exception) -> Reply:
    """Answer requests of a type with an error."""

    def change(message: Message, reply: Message) -> Message:
        if isinstance(message, kind):
            raise error
        return reply

    return change


def answers(kind: type[M], other: Callable[[M], Message]) -> Reply:
    """Change replies of a type."""
    return lambda message, reply: other(reply) if isinstance(reply, kind) else reply


def others(name: str) -> tuple[str, ...]:
    return tuple(other for other in ALL_NAMES if other != name)


# -- a round without a device ------------------------------------------------------------------------------------------

AWAY = LinkTimeout("edge 'edge', waiting for device", "away for 30 s")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("split-a", fails(ModelRelease, AWAY)),
        ("local-a", fails(ModelRelease, AWAY)),
        ("local-b", fails(AnchorRelease, AWAY)),
        ("split-b", fails(SmashRequest, AWAY)),
        ("split-a", answers(SmashedData, lambda reply: Done())),
        ("local-b", fails(AdapterRelease, AWAY)),
        ("local-a", fails(FineTune, AWAY)),
        ("local-a", fails(FineTune, PeerError("local-a", "DataError", "away for 30 s"))),
        ("local-b", answers(AdapterUpdate, lambda reply: Done())),
    ],
    ids=["kit", "local kit", "anchor", "head", "head wrong", "adapter", "learning", "learning there", "learning wrong"],
)
def test_a_device_that_fails_is_left_out_and_named_and_the_others_learn_as_without_it(name: str, change: Reply) -> None:
    world = World(config_for(ALL_NAMES)).installed()
    world.links[name].change = change
    update = world.fine_tune(cycle=4)
    (fault,) = update.faults
    assert fault.startswith(f"cycle 4, edge round 0: without {name}: ")
    assert "away for 30 s" in fault or "does not take a Done" in fault
    assert_equal(replace(update, faults=()), undisturbed(others(name), cycle=4))


def test_without_faults_nothing_is_named() -> None:
    assert undisturbed().faults == ()


def test_a_split_device_that_fails_in_the_first_step_is_left_out() -> None:
    world = World(config_for(ALL_NAMES, batch_size=64)).installed()
    world.links["split-a"].change = fails(BodyOutput, AWAY)
    update = world.fine_tune()
    assert len(update.faults) == 1 and "without split-a: " in update.faults[0]
    expected = World(config_for(others("split-a"), batch_size=64)).installed().fine_tune()
    assert update.num_examples == expected.num_examples
    for key, tensor in expected.tensors.items():
        torch.testing.assert_close(update.tensors[key], tensor, atol=1e-4, rtol=1e-5)
    assert [output.step for output in world.asked(BodyOutput)["split-a"]] == [0]


def test_a_device_that_is_back_takes_part_in_the_next_round() -> None:
    world = World(config_for(ALL_NAMES, edge_rounds=2)).installed()
    world.links["local-a"].change = lambda message, reply: (
        fails(FineTune, AWAY)(message, reply) if message == FineTune(0, 0) else reply
    )
    update = world.fine_tune()
    assert len(update.faults) == 1 and update.faults[0].startswith("cycle 0, edge round 0: without local-a: ")
    assert update.num_examples == sum(map(len, PRIVATE.values()))
    assert world.asked(FineTune)["local-a"] == [FineTune(0, 0), FineTune(0, 1)]


def test_a_device_that_fails_in_every_round_is_named_in_every_round() -> None:
    world = World(config_for(ALL_NAMES, edge_rounds=2)).installed()
    world.links["local-a"].change = fails(FineTune, AWAY)
    starts = [fault.partition(": without")[0] for fault in world.fine_tune().faults]
    assert starts == ["cycle 0, edge round 0", "cycle 0, edge round 1"]
    world.links["local-a"].change = lambda message, reply: reply
    assert world.fine_tune(cycle=1).faults == ()


# -- what a device sends is held against what was asked ----------------------------------------------------------------


def with_first(change: Callable[[Tensor], Tensor]) -> Callable[[AdapterUpdate], AdapterUpdate]:
    """Change one tensor of an update."""

    def changed(update: AdapterUpdate) -> AdapterUpdate:
        name = sorted(update.tensors)[0]
        return replace(update, tensors={**update.tensors, name: change(update.tensors[name])})

    return changed


def one_less(update: AdapterUpdate) -> AdapterUpdate:
    return replace(update, tensors=dict(sorted(update.tensors.items())[1:]))


def one_number(odd: float) -> Callable[[Tensor], Tensor]:
    """Replace the last number of a tensor."""

    def changed(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = odd
        return spoilt

    return changed


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (with_first(one_number(float("nan"))), "expected finite numbers in 'layers.3.*, found NaN or infinity"),
        (with_first(one_number(float("inf"))), "expected finite numbers in 'layers.3.*, found NaN or infinity"),
        (with_first(lambda tensor: tensor[:, :-1]), r"of shape \(2, 48\), found \(2, 47\)"),
        (with_first(lambda tensor: tensor.T), r"of shape \(2, 48\), found \(48, 2\)"),
        (one_less, "different from 'layers.3"),
        (lambda update: replace(update, tensors={**update.tensors, "more": torch.zeros(1)}), "different from 'more'"),
        (lambda update: replace(update, base=BASE - 1), f"version {BASE}, found version {BASE - 1}"),
        (lambda update: replace(update, loss=float("nan")), "the loss of device 'local-a': nan"),
        (lambda update: replace(update, num_examples=0), "examples of device 'local-a': 0, "),
        (lambda update: replace(update, num_examples=-1), "examples of device 'local-a': -1, "),
    ],
    ids=["nan", "infinite", "column less", "turned", "tensor less", "tensor more", "base", "loss", "none", "negative"],
)
def test_an_update_that_does_not_fit_is_refused_and_named(
    change: Callable[[AdapterUpdate], AdapterUpdate], why: str
) -> None:
    world = World(config_for(ALL_NAMES)).installed()
    world.links["local-a"].change = answers(AdapterUpdate, change)
    update = world.fine_tune()
    (fault,) = update.faults
    assert fault.startswith("cycle 0, edge round 0: without local-a: ")
    assert re.search(why, fault)
    assert_equal(replace(update, faults=()), undisturbed(others("local-a")))


def spoilt_rows(smashed: SmashedData) -> SmashedData:
    return replace(smashed, hidden_ND=one_number(float("nan"))(smashed.hidden_ND))


SMASHED = [
    lambda smashed: replace(smashed, owner="split-b"),
    lambda smashed: replace(smashed, split={"train": "test", "test": "train"}[smashed.split]),
    lambda smashed: replace(smashed, next_layer=smashed.next_layer + 1),
    lambda smashed: replace(smashed, next_layer=-1),
    lambda smashed: replace(smashed, hidden_ND=smashed.hidden_ND[:, :-1]),
    spoilt_rows,
]
SMASHED_IDS = ["owner", "split", "layer", "no layer", "width", "not a number"]


@cache
def score_without(name: str) -> EvaluationReport:
    """Return the score of the other devices after a cycle without that one."""
    world = World(config_for(others(name))).installed()
    world.fine_tune()
    return world.score()


@pytest.mark.parametrize("change", SMASHED, ids=SMASHED_IDS)
def test_smashed_data_that_is_not_the_devices_own_is_refused(
    change: Callable[[SmashedData], SmashedData], caplog: pytest.LogCaptureFixture
) -> None:
    world = World(config_for(ALL_NAMES)).installed()
    world.links["split-a"].change = answers(SmashedData, change)
    update = world.fine_tune()
    (fault,) = update.faults
    assert "without split-a: " in fault
    assert (
        "smashed data (owner, split, next layer, width)" in fault or "an activation of device 'split-a': nan" in fault
    )
    assert_equal(replace(update, faults=()), undisturbed(others("split-a")))
    assert world.score() == score_without("split-a")
    assert "edge 'edge' scores without split-a: " in caplog.text
    world.links["split-a"].change = lambda message, reply: reply
    assert world.score().num_examples == sum(map(len, PRIVATE.values()))


def test_scores_need_at_least_one_device() -> None:
    world = World(config_for(("split-a", "local-a"))).installed()
    for link in world.links.values():
        link.change = fails(BodyOutput, AWAY)
    with pytest.raises(LinkTimeout) as raised:
        world.score()
    assert raised.value is AWAY


# -- too few -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [2, 3])
def test_with_fewer_devices_than_wanted_a_round_fails_and_the_adapter_stays_as_it_was(num: int) -> None:
    world = World(config_for(ALL_NAMES, faults={"min_devices": 3})).installed()
    failing = ALL_NAMES[-num:]  # among them both local ones: the split cohort has learned by then
    for name in failing:
        world.links[name].change = fails(BodyOutput if name == "split-b" else FineTune, AWAY)
    with pytest.raises(TooFewDevices, match=rf"edge 'edge' needs 3 devices .* but {4 - num} took part: .*") as raised:
        world.fine_tune()
    assert all(f"{name}: " in str(raised.value) for name in failing)
    for name in failing:
        world.links[name].change = lambda message, reply: reply
    assert_equal(world.fine_tune(), undisturbed())


def test_as_many_devices_as_wanted_are_enough() -> None:
    world = World(config_for(ALL_NAMES, faults={"min_devices": 3})).installed()
    world.links["local-b"].change = fails(FineTune, AWAY)
    assert len(world.fine_tune().faults) == 1


def test_a_second_round_that_fails_leaves_what_the_first_has_learned() -> None:
    config = config_for(ALL_NAMES, edge_rounds=2, faults={"min_devices": 4})
    world = World(config).installed()
    world.links["local-a"].change = lambda message, reply: (
        fails(FineTune, AWAY)(message, reply) if message == FineTune(0, 1) else reply
    )
    with pytest.raises(TooFewDevices):
        world.fine_tune()
    world.links["local-a"].change = lambda message, reply: reply
    assert_equal(world.fine_tune(), undisturbed(edge_rounds=2))
    assert world.asked(FineTune)["local-b"] == [FineTune(0, 0), FineTune(0, 1), FineTune(0, 1)]


@pytest.mark.parametrize("names", [("split-a", "split-b"), ("local-a", "local-b"), ("local-a", "split-a")])
def test_where_all_failed_the_first_ones_reason_is_the_edges(names: tuple[str, ...]) -> None:
    world = World(config_for(names)).installed()
    errors: dict[str, GaisnetError] = {name: LinkTimeout(name, "away") for name in names}
    for name, error in errors.items():
        world.links[name].change = fails(ModelRelease, error)
    with pytest.raises(LinkTimeout) as raised:
        world.fine_tune()
    assert raised.value is errors[names[0]]
    for link in world.links.values():
        link.change = lambda message, reply: reply
    assert_equal(world.fine_tune(), undisturbed(names))


def test_where_all_failed_while_they_learned_the_adapter_stays_as_it_was() -> None:
    names = ("split-a", "split-b")
    world = World(config_for(names)).installed()
    for link in world.links.values():  # they learn for a step, and fail in the next
        link.change = lambda message, reply: (
            fails(BodyOutput, AWAY)(message, reply) if isinstance(reply, BodyOutputGrad) and reply.step else reply
        )
    with pytest.raises(LinkTimeout):
        world.fine_tune()
    for link in world.links.values():
        link.change = lambda message, reply: reply
    assert_equal(world.fine_tune(), undisturbed(names))


# -- stopped and built anew --------------------------------------------------------------------------------------------


def stops_at(message: Message) -> Reply:
    """End the process while it waits for the reply to this."""

    def change(asked: Message, reply: Message) -> Message:
        if asked == message:
            raise Stopped
        return reply

    return change


class StopsInStep:
    """A progress callback that ends the process after so many training steps."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self._left -= 1
        if self._left == 0:
            raise Stopped


@pytest.mark.parametrize("relay", [False, True], ids=["no relay", "relay"])
@pytest.mark.parametrize("how", ["a device's link", "a step"])
def test_an_edge_that_was_stopped_in_the_second_round_ends_as_one_that_was_not(
    tmp_path: Path, how: str, relay: bool
) -> None:
    config = config_for(ALL_NAMES, edge_rounds=2, relay=RELAY if relay else {"enabled": False})
    in_second_round = 2 * 2 + 1  # two epochs of two batches are the first
    world = World(config, tmp_path, StopsInStep(in_second_round) if how == "a step" else silent).installed()
    if how != "a step":
        world.links["local-b"].change = stops_at(FineTune(0, 1))
    with pytest.raises(Stopped):
        world.fine_tune()
    again = World(config, tmp_path)
    assert again.edge.handle(Install("run", "digest")) == Installed(int(relay), BASE)
    assert_equal(again.fine_tune(), undisturbed(edge_rounds=2, relay=relay))
    assert again.cloud.asked == []
    assert again.asked(FineTune) == {
        "split-a": [],
        "split-b": [],
        "local-a": [FineTune(0, 1)],
        "local-b": [FineTune(0, 1)],
    }


def test_an_edge_that_was_stopped_in_the_first_round_begins_it_again(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES, edge_rounds=2)
    world = World(config, tmp_path, StopsInStep(3)).installed()
    with pytest.raises(Stopped):
        world.fine_tune()
    assert_equal(World(config, tmp_path).fine_tune(), undisturbed(edge_rounds=2))


def test_faults_of_the_rounds_before_are_kept(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES, edge_rounds=2)
    world = World(config, tmp_path).installed()
    world.links["local-a"].change = lambda message, reply: (
        fails(FineTune, AWAY)(message, reply) if message == FineTune(0, 0) else stops_at(FineTune(0, 1))(message, reply)
    )
    with pytest.raises(Stopped):
        world.fine_tune()
    (fault,) = World(config, tmp_path).fine_tune().faults
    assert fault.startswith("cycle 0, edge round 0: without local-a: ")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_cycle_that_is_finished_is_not_learned_again(tmp_path: Path, restarted: bool) -> None:
    config = config_for(ALL_NAMES, edge_rounds=2)
    world = World(config, tmp_path).installed()
    update = world.fine_tune(cycle=BASE)
    if restarted:
        world = World(config, tmp_path)
    for link in world.links.values():
        link.asked.clear()
    assert world.edge.handle(Install("run", "digest")) == Installed(0, BASE + 1)
    assert_equal(world.fine_tune(cycle=BASE), update)
    assert all(link.asked == [] for link in world.links.values())


def test_the_next_cycle_after_a_restart_is_that_of_an_edge_that_went_on(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES)
    one_life = World(config).installed()
    one_life.fine_tune(cycle=0)
    World(config, tmp_path).installed().fine_tune(cycle=0)
    again = World(config, tmp_path)
    assert_equal(again.fine_tune(cycle=1), one_life.fine_tune(cycle=1))
    assert again.score() == one_life.score()


def test_an_adapter_that_is_given_back_after_a_cycle_begins_the_cycle_anew(tmp_path: Path) -> None:
    world = World(config_for(ALL_NAMES), tmp_path).installed()
    first = world.fine_tune()
    world.edge.handle(AdapterRelease("domain", BASE, random_tensors("domain", 5)))  # the cloud went back
    assert_equal(world.fine_tune(), first)
    assert world.asked(FineTune)["local-a"] == [FineTune(0, 0)] * 2


def test_a_new_run_begins_anew_with_the_model_that_is_there(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES, relay=RELAY)
    World(config, tmp_path).installed().fine_tune()
    again = World(config, tmp_path).installed("another run")
    assert again.cloud.asked == [AnchorRequest()]
    assert_equal(again.fine_tune(), undisturbed(relay=True))


def test_a_new_run_in_the_same_life_begins_anew() -> None:
    config = config_for(ALL_NAMES, relay=RELAY)
    world = World(config).installed()
    first = world.fine_tune()
    world.score()
    for link in world.links.values():
        link.asked.clear()
    assert_equal(world.installed("another run").fine_tune(), first)
    assert all(world.asked(ModelRelease).values()) and world.asked(SmashRequest)["split-a"]
    assert world.score().num_examples == sum(map(len, PRIVATE.values()))


def test_another_model_is_asked_for(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES)
    World(config, tmp_path).installed()
    again = World(config, tmp_path)
    assert again.edge.handle(Install("run", "another digest")) == Installed(0, -1)
    assert again.cloud.asked == [ModelRequest(), AnchorRequest()]


def test_what_is_there_is_not_asked_for_again() -> None:
    world = World(config_for(ALL_NAMES)).installed()
    assert world.edge.handle(Install("run", "digest")) == Installed(0, BASE)
    assert world.cloud.asked == [ModelRequest(), AnchorRequest()]


def test_an_edge_that_was_stopped_before_it_had_everything_of_a_run_has_nothing(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES)
    World(config, tmp_path).installed().fine_tune()
    World(config, tmp_path).edge.handle(Install("another run", "digest"))  # stopped before the adapter came
    again = World(config, tmp_path)
    with pytest.raises(UnexpectedMessage, match="edge 'edge', which has no model yet, does not take"):
        again.fine_tune()
    assert_equal(again.installed("another run").fine_tune(), undisturbed())


def test_an_edge_without_a_model_has_nothing_to_do() -> None:
    world = World(config_for(ALL_NAMES))
    for message in (FineTune(0), Evaluate("domain", None), AdapterRelease("domain", 0, {})):
        with pytest.raises(UnexpectedMessage, match="has no model yet"):
            world.edge.handle(message)
    assert world.traffic() == TrafficReport(0, 0, 0, 0)


@pytest.mark.parametrize("name", ["model", "anchor", "progress"])
def test_a_damaged_shelf_is_named(tmp_path: Path, name: str) -> None:
    config = config_for(ALL_NAMES)
    World(config, tmp_path).installed()
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{name}\.safetensors' cannot be read"):
        World(config, tmp_path)


def test_the_shelf_of_another_configuration_is_named(tmp_path: Path) -> None:
    World(config_for(ALL_NAMES), tmp_path).installed()
    with pytest.raises(GaisnetError, match="expected"):
        World(config_for(ALL_NAMES, adapters={"rank": 4, "alpha": 6, "first_layer": 3}), tmp_path)


def test_a_disk_that_is_full_stops_a_round_and_not_the_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(ALL_NAMES, edge_rounds=2)
    world = World(config, tmp_path).installed()

    def full(*arguments: object) -> None:
        raise OutputNotWritable(tmp_path, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "save", full)
        with pytest.raises(OutputNotWritable):
            world.fine_tune()
    assert_equal(world.fine_tune(), undisturbed(edge_rounds=2))
    assert_equal(World(config, tmp_path).fine_tune(), undisturbed(edge_rounds=2))


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_the_ledger_goes_on_from_what_was_reported_last(tmp_path: Path) -> None:
    config = config_for(ALL_NAMES)
    world = World(config, tmp_path).installed()
    world.fine_tune()
    world.score()
    before = world.traffic()
    assert before.device_edge_up > 0 and before.device_edge_down > 0
    again = World(config, tmp_path)
    assert again.traffic() == before
    again.fine_tune(cycle=1)
    after, own = again.traffic(), again.ledger.traffic("device_edge")
    assert (after.device_edge_up, after.device_edge_down) == (own.bytes_up, own.bytes_down)
    assert after.device_edge_up > before.device_edge_up and after.device_edge_down > before.device_edge_down
    assert World(config, tmp_path).traffic() == after


@pytest.mark.parametrize("local_devices", ["parallel", "sequential"])
def test_a_local_device_that_restarts_is_given_what_it_was_told_to_begin_with(
    tmp_path: Path, local_devices: str
) -> None:
    config = config_for(("split-a", "local-a"), fine_tune={"local_devices": local_devices})
    world = World(config, tmp_path).installed()
    before = world.edge.handle(FineTune(0))
    assert isinstance(before, AdapterUpdate)
    kits: list[AdapterRelease] = []

    def look(message: Message, reply: Message) -> Message:
        if isinstance(message, FineTune):
            kits.extend(
                m for m in world.edge._setup_messages("local-a") if isinstance(m, AdapterRelease) and m.role == "domain"
            )
        return reply

    local = world.links["local-a"]
    local.change = look
    world.edge.handle(FineTune(1))
    *_, told, order = local.asked
    assert isinstance(told, AdapterRelease) and isinstance(order, FineTune)
    (kit,) = kits
    assert all(torch.equal(kit.tensors[key], tensor) for key, tensor in told.tensors.items())
    same = all(torch.equal(before.tensors[key], tensor) for key, tensor in told.tensors.items())
    assert same == (local_devices == "parallel")
