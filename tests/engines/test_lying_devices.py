"""One lying device in a whole run, for every message that a device sends: the run finishes and names it.

The other domain's results never change, and those of its own edge are what they are in a run without the device, where
it lies from its first message on.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gaisnet.errors import LinkTimeout
from gaisnet.messages import (
    AdapterUpdate,
    BodyOutputGrad,
    Done,
    EvaluationReport,
    Lengths,
    Message,
    SmashedData,
    TrafficReport,
)
from gaisnet.tiers.device.device import Device
from tests.engines.test_local_network import Run, quick

pytestmark = pytest.mark.integration

SPLIT, LOCAL = "north-a", "north-c"
HONEST = Device.handle
Handle = Callable[[Device, Message], Message]


def lying(name: str, kind: type[Message], change: Callable[[Any], Message]) -> Handle:
    def handle(self: Device, message: Message) -> Message:
        reply = HONEST(self, message)
        return change(reply) if self.name == name and isinstance(reply, kind) else reply

    return handle


def absent(name: str) -> Handle:
    def handle(self: Device, message: Message) -> Message:
        if self.name == name:
            raise LinkTimeout(f"device '{name}'", "it is away")
        return HONEST(self, message)

    return handle


def ran(handle: Handle, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(Device, "handle", handle)
    run = Run(quick(cycles=2)).go()
    run.network.lengths()
    return run


@pytest.fixture(scope="module")
def honest() -> Run:
    return Run(quick(cycles=2)).go()


def named(run: Run, caplog: pytest.LogCaptureFixture, name: str) -> bool:
    faults = [fault for cycle in run.updates for update in cycle.values() for fault in update.faults]
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    others = [other for other in ("north-b", "south-") for said in faults if f"without {other}" in said]
    return not others and any(name in said for said in [*faults, *warnings])


def assert_same_learning(run: Run, other: Run, domain: str) -> None:
    for mine, theirs in zip(run.updates, other.updates, strict=True):
        found, expected = mine[domain].tensors, theirs[domain].tensors
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


FROM_THE_FIRST: dict[str, tuple[str, type[Message], Callable[[Any], Message]]] = {
    "another answer than its kit's": (SPLIT, Done, lambda _: TrafficReport(0, 0, 0, 0)),
    "activations that are not finite": (
        SPLIT,
        SmashedData,
        lambda m: replace(m, hidden_ND=torch.full_like(m.hidden_ND, math.inf)),
    ),
    "activations of another device": (SPLIT, SmashedData, lambda m: replace(m, owner="north-b")),
    "another answer than a local kit's": (LOCAL, Done, lambda _: TrafficReport(0, 0, 0, 0)),
}
LATER: dict[str, tuple[str, type[Message], Callable[[Any], Message]]] = {
    "a gradient times -1e6": (SPLIT, BodyOutputGrad, lambda m: replace(m, grad_ND=-1e6 * m.grad_ND)),
    "a gradient that is NaN": (SPLIT, BodyOutputGrad, lambda m: replace(m, grad_ND=m.grad_ND * math.nan)),
    "a step's loss of 1e308": (SPLIT, BodyOutputGrad, lambda m: replace(m, loss_sum=1e308)),
    "a report with a NaN": (SPLIT, EvaluationReport, lambda m: replace(m, loss_sum=math.nan)),
    "more right than there are": (LOCAL, EvaluationReport, lambda m: replace(m, num_correct=m.num_examples + 1)),
    "an update times 1e18": (
        LOCAL,
        AdapterUpdate,
        lambda m: replace(m, tensors={key: 1e18 * tensor for key, tensor in m.tensors.items()}),
    ),
    "an update of 10^9 examples": (LOCAL, AdapterUpdate, lambda m: replace(m, num_examples=10**9)),
    "no lengths": (SPLIT, Lengths, lambda _: Done()),
}
ALWAYS = ("activations that are not finite", "an update times 1e18")


def cases(lies: dict[str, Any]) -> list[Any]:
    return [pytest.param(*lie, id=name, marks=() if name in ALWAYS else pytest.mark.slow) for name, lie in lies.items()]


@pytest.mark.parametrize(("name", "kind", "change"), cases(FROM_THE_FIRST))
def test_a_device_that_lies_from_its_first_message_on_is_as_if_it_were_not_there(
    name: str,
    kind: type[Message],
    change: Callable[[Any], Message],
    honest: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = ran(lying(name, kind, change), monkeypatch)
    assert named(run, caplog, name)
    without = ran(absent(name), monkeypatch)
    assert_same_learning(run, without, "shapes")
    assert_same_learning(run, honest, "tastes")
    assert run.scores[-1] == without.scores[-1]
    assert run.scores[-1].domain["tastes"] == honest.scores[-1].domain["tastes"]


@pytest.mark.parametrize(("name", "kind", "change"), cases(LATER))
def test_a_device_that_lies_later_is_named_and_the_run_finishes_with_numbers_that_can_be_meant(
    name: str,
    kind: type[Message],
    change: Callable[[Any], Message],
    honest: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = ran(lying(name, kind, change), monkeypatch)
    assert named(run, caplog, name)
    assert_same_learning(run, honest, "tastes")
    last = run.scores[-1]
    assert last.domain["tastes"] == honest.scores[-1].domain["tastes"]
    assert all(math.isfinite(report.loss_sum) for report in (*last.domain.values(), *last.foundation.values()))
    assert all(float(tensor.abs().max()) < 10.0 for tensor in run.updates[-1]["shapes"].tensors.values())
