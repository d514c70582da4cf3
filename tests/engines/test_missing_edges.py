"""An edge that lies, fails or is away: it is named, and the other domains go on."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from gaisnet.config import FaultSettings
from gaisnet.config.file import parse_config
from gaisnet.errors import ConfigError, LinkLost, LinkTimeout, PeerError, TooFewEdges
from gaisnet.messages import (
    AdapterUpdate,
    Done,
    Evaluate,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Message,
    TrafficReport,
)
from gaisnet.tiers.cloud import edge_client
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.transport.base import Link
from tests.engines.test_local_network import Run, quick
from tests.tiny import tiny_raw_config

pytestmark = pytest.mark.integration

Change = Callable[[Message, Message], Message]
SHAPES, TASTES = "shapes", "tastes"
AWAY = LinkTimeout("the cloud, waiting for the edge", "away for 30 s")


class Lying:
    """A link to an edge whose answers a test may change on the way."""

    peer = "here"

    def __init__(self, link: Link, change: Change) -> None:
        self._link = link
        self.change = change

    def send(self, message: Message) -> Future[Message]:
        answer: Future[Message] = Future()
        try:
            answer.set_result(self.change(message, self._link.send(message).result()))
        except Exception as error:
            answer.set_exception(error)
        return answer


def run_with(change: Change, **changes: Any) -> tuple[Run, Lying]:
    """One cycle of two edges, of which the second is changed."""
    run = Run(quick(cycles=1, **changes))
    edges = dict(run.network.edges.links)
    edges[TASTES] = lying = Lying(edges[TASTES], change)
    run.network.edges.links = edges
    return run, lying


def answers(kind: type[Message], other: Callable[[Any], Message]) -> Change:
    return lambda message, reply: other(reply) if isinstance(reply, kind) else reply


def fails(*kinds: type[Message], error: Exception = AWAY) -> Change:
    def change(message: Message, reply: Message) -> Message:
        if isinstance(message, kinds):
            raise error
        return reply

    return change


@pytest.fixture(scope="module")
def honest() -> Run:
    return Run(quick(cycles=1)).go()


def nan_report(report: EvaluationReport) -> EvaluationReport:
    return replace(report, loss_sum=float("nan"))


def poisoned(update: AdapterUpdate) -> AdapterUpdate:
    return replace(update, tensors={key: tensor * 1e18 for key, tensor in update.tensors.items()})


LIES: dict[str, Change] = {
    "installed": answers(Installed, lambda m: replace(m, relay=2**31)),
    "report": answers(EvaluationReport, nan_report),
    "more right than there are": answers(EvaluationReport, lambda m: replace(m, num_correct=m.num_examples + 1)),
    "adapter": answers(AdapterUpdate, poisoned),
    "update of another shape": answers(AdapterUpdate, lambda m: replace(m, tensors={})),
    "a book of faults": answers(AdapterUpdate, lambda m: replace(m, faults=("x" * 10**6,))),
    "traffic": answers(TrafficReport, lambda m: replace(m, device_edge_up=-1)),
    "away": fails(Message),
    "failing": fails(FineTune, error=PeerError("south", "RuntimeError", "broken")),
}
ALWAYS = ("report", "adapter")


@pytest.mark.parametrize("lie", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.slow, id=n) for n in LIES])
def test_an_edge_that_lies_is_left_out_by_name_and_the_other_domain_goes_on(lie: str, honest: Run) -> None:
    run, lying = run_with(LIES[lie])
    run.go()
    run.network.traffic()
    faults = run.network.drain_faults()
    assert faults and all(fault.startswith(f"{TASTES}: cycle ") for fault in faults)
    assert run.network.drain_faults() == []
    expected = honest.updates[0][SHAPES]
    found = run.updates[0][SHAPES]
    assert replace(found, tensors={}) == replace(expected, tensors={})
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())
    assert run.scores[-1].domain[SHAPES] == honest.scores[-1].domain[SHAPES]
    if lie not in ("traffic", "installed"):
        assert run.scores[-1].domain.keys() == {SHAPES}
    lying.change = lambda message, reply: reply
    run.network.release()
    assert run.network.fine_tune().keys() == {SHAPES, TASTES}  # it is back
    run.network.absorb()
    assert run.network.evaluate().domain.keys() == {SHAPES, TASTES}


def test_a_poisoned_adapter_never_comes_into_what_the_cloud_keeps() -> None:
    run, _ = run_with(LIES["adapter"])
    network = run.network
    network.install()
    before = network.cloud.adapter_release("domain", TASTES)
    network.fine_tune()
    network.absorb()
    after = network.cloud.adapter_release("domain", TASTES)
    assert after.version == before.version == 0
    assert all(torch.equal(after.tensors[key], tensor) for key, tensor in before.tensors.items())
    assert all(float(tensor.abs().max()) < 10.0 for tensor in network.checkpoint_state()[1].values())


def test_with_fewer_edges_than_wanted_the_cycle_fails_and_says_so() -> None:
    run, lying = run_with(fails(FineTune), faults={"min_edges": 2})
    run.network.install()
    with pytest.raises(TooFewEdges, match=r"needs 2 edges \(faults.min_edges\) but 1 are left: tastes: .*away"):
        run.network.fine_tune()
    lying.change = lambda message, reply: reply
    assert run.network.fine_tune().keys() == {SHAPES, TASTES}


class Restarting:
    """A link to an edge that loses a request, and answers the next one; or, if it hangs, none."""

    def __init__(self, hangs: bool = False) -> None:
        self.peer, self._hangs, self._lost = "here", hangs, False

    def send(self, message: Message) -> Future[Message]:
        answer: Future[Message] = Future()
        if not self._hangs and self._lost:
            answer.set_result(Done())
        elif not self._hangs:
            self._lost = True
            answer.set_exception(LinkLost("north", "it restarted"))
        return answer


def test_an_edge_that_restarts_while_another_one_hangs_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_client, "_RETRY_S", 0.0)
    edges = {SHAPES: Restarting(hangs=True), TASTES: Restarting()}
    asker = edge_client.EdgeClient(edges, (SHAPES, TASTES), FaultSettings(edge_deadline_s=1.0), lambda *_: None)
    assert asker.ask(dict.fromkeys(edges, Install("", "")), Done) == {TASTES: Done()}
    (fault,) = asker.drain_faults()
    assert fault.startswith(f"{SHAPES}: cycle 0: ") and "no answer for 1 s" in fault


def test_an_edge_that_missed_a_cycle_is_not_waited_for_again_while_it_is_away() -> None:
    run, _ = run_with(fails(FineTune), faults={"edge_deadline_s": 3600.0, "away_s": 0.0})
    run.network.install()
    run.network.fine_tune()
    away = Restarting(hangs=True)
    away.peer = ""
    run.network.edges.links = {**run.network.edges.links, TASTES: away}
    run.network.release()  # at once, not after an hour
    assert run.network.fine_tune().keys() == {SHAPES}


def test_more_edges_than_there_are_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="faults.min_edges is 3, but there are 2 edges"):
        parse_config(tiny_raw_config(faults={"min_edges": 3}))


def test_every_model_is_scored_on_the_domains_that_are_there() -> None:
    run, _ = run_with(fails(Evaluate))
    network = run.network
    network.install()
    everywhere = network.evaluate_across_domains(network.evaluate())
    assert everywhere.domain[SHAPES].keys() == {SHAPES} and everywhere.domain[TASTES].keys() == {SHAPES}
    network.release()
    network.fine_tune()
    network.absorb()
    everywhere = network.evaluate_across_domains(network.evaluate())
    assert everywhere.foundation[TASTES].keys() <= {SHAPES}
    assert everywhere.foundation[MERGED].keys() == {SHAPES}


def test_bytes_of_an_edge_that_is_away_are_those_it_reported_last() -> None:
    run, lying = run_with(lambda message, reply: reply)
    run.network.install()
    before = run.network.traffic()["device_edge"]
    lying.change = fails(Message)
    run.network.evaluate()
    assert run.network.traffic()["device_edge"].bytes_down >= before.bytes_down


def test_an_edge_that_was_away_at_the_start_is_installed_in_the_next_cycle() -> None:
    run, lying = run_with(fails(Install))
    run.network.install()
    assert run.network.evaluate().domain.keys() == {SHAPES}
    lying.change = lambda message, reply: reply
    run.network.release()
    assert run.network.evaluate().domain.keys() == {SHAPES, TASTES}
