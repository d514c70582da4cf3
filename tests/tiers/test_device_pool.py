"""A device pool over unreliable links: kits, requests, waiting and giving up."""

from collections.abc import Callable, Sequence

import pytest

from gaisnet.config import FaultSettings
from gaisnet.errors import GaisnetError, LinkLost, LinkTimeout, PeerError, UnexpectedMessage
from gaisnet.messages import (
    AdapterRelease,
    Done,
    Evaluate,
    EvaluationReport,
    Install,
    Message,
)
from gaisnet.tiers.edge.device_pool import DevicePool
from tests.clock import Awaited, Clock

AWAY_S = 30.0
DEADLINE_S = 100.0
STALL_S = 1e6
LOOK_S = 1.0  # the cluster notices what happens a little late

ASK = Evaluate("domain", None)
REPORT = EvaluationReport(2, 1, 4, 0.5)
NEWS = AdapterRelease("domain", 1, {})
KIT = (Install("kit", "model"), Install("kit", "adapter"))


class Site:
    """A device at the other end of a link: present or away, slow or fast, without its kit after a restart."""

    def __init__(self, clock: Clock, life: str = "first") -> None:
        self.peer = life
        self.delay_s = 0.0
        self.heard: list[tuple[str, Message]] = []  # with the life that heard it
        self.fails: dict[type[Message], Message | GaisnetError] = {}
        self._clock = clock
        self._held: list[Message] = []
        self._open: list[tuple[Message, Awaited]] = []

    def send(self, message: Message) -> Awaited:
        answer = Awaited(self._clock)
        self._open.append((message, answer))
        if self.peer:
            self._hear(message, answer)
        return answer

    def die(self) -> None:
        self.peer = ""

    def reconnect(self, life: str) -> None:
        """Return in the same incarnation; requests sent meanwhile arrive."""
        self.peer = life
        for message, answer in self._open:
            self._hear(message, answer)

    def restart(self, life: str) -> None:
        """Return in a new incarnation, without any state."""
        self.peer = life
        self._held.clear()
        forgotten, self._open = self._open, []
        for _, answer in forgotten:
            answer.settle(LinkLost("site", "it restarted"))

    def asked(self) -> int:
        """Number of requests, without kits."""
        return sum(not isinstance(message, Install) for _, message in self.heard)

    def _hear(self, message: Message, answer: Awaited) -> None:
        life = self.peer
        self.heard.append((life, message))
        self._clock.after(self.delay_s, lambda: self._answer(life, message, answer))

    def _answer(self, life: str, message: Message, answer: Awaited) -> None:
        if self.peer != life:
            return
        self._open = [(m, a) for m, a in self._open if a is not answer]
        answer.settle(self.fails.get(type(message)) or self._reply(message))

    def _reply(self, message: Message) -> Message | GaisnetError:
        if isinstance(message, Install):
            self._held.append(message)
            return Done()
        if self._held[-2:] != list(KIT):
            return PeerError("site", "UnexpectedMessage", "it has no model yet")
        return REPORT if isinstance(message, Evaluate) else Done()


class Bench:
    """A pool of scripted devices a, b and c."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.a, self.b, self.c = (Site(clock) for _ in range(3))
        self.sites = {"a": self.a, "b": self.b, "c": self.c}
        faults = FaultSettings(round_deadline_s=DEADLINE_S, away_s=AWAY_S)
        self.cluster = DevicePool("edge 'north'", self.sites, faults, lambda name: KIT)

    def ask(self, *names: str, deadline_s: float = DEADLINE_S) -> dict[str, EvaluationReport | GaisnetError]:
        return self.cluster.ask_devices(dict.fromkeys(names, ASK), EvaluationReport, deadline_s)

    def seconds(self, work: Callable[[], object]) -> float:
        before = self.clock.now
        work()
        return self.clock.now - before


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    clock = Clock()
    clock.install(monkeypatch, "gaisnet.tiers.edge.device_pool", "gaisnet.transport.base")
    return Bench(clock)


def lives(site: Site) -> list[tuple[str, Sequence[Message]]]:
    """Return the messages that each incarnation of a device received, in order."""
    order = list(dict.fromkeys(life for life, _ in site.heard))
    return [(life, [message for heard_by, message in site.heard if heard_by == life]) for life in order]


# -- kits --------------------------------------------------------------------------------------------------------------


def test_a_newcomer_is_given_its_kit_once_and_before_it_is_asked(bench: Bench) -> None:
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert bench.ask("a", "b") == {"a": REPORT, "b": REPORT}
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert bench.ask("a") == {"a": REPORT}
    assert lives(bench.a) == [("first", [*KIT, ASK, ASK])]
    assert lives(bench.b) == [("first", [*KIT, ASK])]
    assert bench.c.heard == []


def test_after_a_forgetting_all_are_given_their_kit_again(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.cluster.mark_unequipped()
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert lives(bench.a) == lives(bench.b) == [("first", [*KIT, *KIT])]


def test_one_that_restarts_in_the_middle_is_given_its_kit_again_and_asked_once_more(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.a.delay_s = 10.0
    bench.clock.after(3.0, bench.a.die)
    bench.clock.after(8.0, lambda: bench.a.restart("second"))
    assert bench.ask("a", "b") == {"a": REPORT, "b": REPORT}
    assert lives(bench.a) == [("first", [*KIT, ASK]), ("second", [*KIT, ASK])]
    assert lives(bench.b) == [("first", [*KIT, ASK])]


def test_one_that_restarts_every_time_is_not_asked_for_ever(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.a.delay_s = 4.0
    for number in range(50):
        bench.clock.after(6.0 * number + 2.0, lambda n=number: bench.a.restart(f"life {n}"))  # type: ignore[misc]
    outcomes = bench.ask("a", "b")
    assert isinstance(outcomes["a"], LinkLost) and outcomes["b"] == REPORT
    assert bench.a.asked() == 2


def test_one_that_restarted_between_two_requests_is_given_its_kit_before_the_second(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.ask("a", "b")
    bench.a.restart("second")
    assert bench.ask("a", "b") == {"a": REPORT, "b": REPORT}
    assert lives(bench.a) == [("first", [*KIT, ASK]), ("second", [*KIT, ASK])]


def test_one_that_refuses_its_kit_is_not_had_and_tried_again_the_next_time(bench: Bench) -> None:
    bench.a.fails[Install] = PeerError("a", "ModelError", "no memory")
    missing = bench.cluster.ensure_ready(["a", "b"])
    assert missing.keys() == {"a"} and "no memory" in str(missing["a"])
    bench.a.fails.clear()
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert bench.ask("a", "b") == {"a": REPORT, "b": REPORT}


def test_one_that_answers_its_kit_with_something_else_is_not_had(bench: Bench) -> None:
    bench.a.fails[Install] = REPORT
    missing = bench.cluster.ensure_ready(["a", "b"])
    assert missing.keys() == {"a"} and isinstance(missing["a"], UnexpectedMessage)


def test_one_that_stalls_over_its_kit_is_waited_for_until_the_deadline(bench: Bench) -> None:
    bench.a.delay_s = STALL_S
    missing: dict[str, GaisnetError] = {}
    seconds = bench.seconds(lambda: missing.update(bench.cluster.ensure_ready(["a", "b"])))
    assert missing.keys() == {"a"} and isinstance(missing["a"], LinkTimeout)
    assert DEADLINE_S <= seconds <= DEADLINE_S + LOOK_S


# -- away --------------------------------------------------------------------------------------------------------------


def test_one_that_is_away_is_waited_for_once_until_it_is_back(bench: Bench) -> None:
    bench.a.die()
    missing: dict[str, GaisnetError] = {}
    seconds = bench.seconds(lambda: missing.update(bench.cluster.ensure_ready(["a", "b"])))
    assert missing.keys() == {"a"} and isinstance(missing["a"], LinkTimeout)
    assert str(missing["a"]).startswith("edge 'north' needs device 'a': it is away; ")
    assert AWAY_S <= seconds <= AWAY_S + LOOK_S
    assert bench.seconds(lambda: bench.cluster.ensure_ready(["a", "b"])) < LOOK_S
    bench.a.restart("second")
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert bench.ask("a", "b") == {"a": REPORT, "b": REPORT}
    bench.a.die()
    assert AWAY_S <= bench.seconds(lambda: bench.cluster.ensure_ready(["a"])) <= AWAY_S + LOOK_S


def test_one_that_comes_back_in_time_is_had(bench: Bench) -> None:
    bench.a.die()
    bench.clock.after(AWAY_S / 2, lambda: bench.a.restart("second"))
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert lives(bench.a) == [("second", [*KIT])]


def test_several_that_are_away_are_waited_for_together(bench: Bench) -> None:
    for site in bench.sites.values():
        site.die()
    missing: dict[str, GaisnetError] = {}
    seconds = bench.seconds(lambda: missing.update(bench.cluster.ensure_ready(["a", "b", "c"])))
    assert missing.keys() == {"a", "b", "c"}
    assert seconds <= AWAY_S + LOOK_S


def test_one_that_goes_away_while_it_is_asked_is_given_up_and_others_answer_meanwhile(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.a.delay_s = bench.b.delay_s = 10.0
    bench.clock.after(5.0, bench.a.die)
    outcomes: dict[str, EvaluationReport | GaisnetError] = {}
    seconds = bench.seconds(lambda: outcomes.update(bench.ask("a", "b")))
    assert isinstance(outcomes["a"], LinkTimeout) and "away for 30 s" in str(outcomes["a"])
    assert outcomes["b"] == REPORT
    assert 5.0 + AWAY_S - LOOK_S <= seconds <= 5.0 + AWAY_S + LOOK_S
    assert bench.seconds(lambda: bench.ask("a")) < LOOK_S
    assert bench.seconds(lambda: bench.cluster.ensure_ready(["a"])) < LOOK_S


def test_what_it_was_asked_before_it_was_given_up_is_dropped(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a"])
    bench.a.die()
    asked = bench.cluster.send_requests({"a": ASK})
    assert isinstance(bench.cluster.collect_replies(asked, EvaluationReport, DEADLINE_S)["a"], LinkTimeout)
    assert asked.replies["a"].cancelled()


def test_a_link_that_drops_for_a_moment_costs_no_kit(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a"])
    bench.a.die()
    bench.clock.after(5.0, lambda: bench.a.reconnect("first"))
    assert bench.ask("a") == {"a": REPORT}
    assert bench.cluster.ensure_ready(["a"]) == {}
    assert lives(bench.a) == [("first", [*KIT, ASK])]


# -- slow and wrong ----------------------------------------------------------------------------------------------------


def test_those_that_stall_are_waited_for_together_and_others_answer_meanwhile(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b", "c"])
    bench.a.delay_s = bench.b.delay_s = STALL_S
    bench.c.delay_s = 12.0
    outcomes: dict[str, EvaluationReport | GaisnetError] = {}
    seconds = bench.seconds(lambda: outcomes.update(bench.ask("a", "b", "c", deadline_s=20.0)))
    assert outcomes["c"] == REPORT
    for name in ("a", "b"):
        assert isinstance(outcomes[name], LinkTimeout)
    expected = "edge 'north', waiting for a EvaluationReport of device 'a': no answer for 20 s; "
    assert str(outcomes["a"]).startswith(expected)
    assert 20.0 <= seconds <= 20.0 + LOOK_S


def test_the_deadline_holds_over_a_restart_as_well(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a"])
    bench.a.delay_s = 8.0
    bench.clock.after(7.0, lambda: bench.a.restart("second"))
    outcomes: dict[str, EvaluationReport | GaisnetError] = {}
    seconds = bench.seconds(lambda: outcomes.update(bench.ask("a", deadline_s=20.0)))
    assert isinstance(outcomes["a"], LinkTimeout)  # 7 s, 8 s for its kit, and 8 s again are more
    assert 20.0 <= seconds <= 20.0 + LOOK_S


def test_work_goes_on_between_asking_and_waiting(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a"])
    bench.a.delay_s = 50.0
    asked = bench.cluster.send_requests({"a": ASK})
    bench.clock.sleep(49.0)
    assert bench.cluster.collect_replies(asked, EvaluationReport, 5.0) == {"a": REPORT}


def test_a_wrong_answer_is_the_error_of_one_device(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b", "c"])
    bench.b.fails[Evaluate] = Done()
    outcomes = bench.ask("a", "b", "c")
    assert (outcomes["a"], outcomes["c"]) == (REPORT, REPORT)
    assert isinstance(outcomes["b"], UnexpectedMessage) and "Done" in str(outcomes["b"])


def test_an_error_of_one_device_is_its_own(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.a.fails[Evaluate] = error = PeerError("a", "DataError", "no examples")
    assert bench.ask("a", "b") == {"a": error, "b": REPORT}
    assert bench.a.asked() == 1


# -- news --------------------------------------------------------------------------------------------------------------


def test_news_goes_to_those_that_have_their_kit(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    assert bench.cluster.notify_devices(["a", "b", "c"], NEWS) == {}
    assert lives(bench.a) == lives(bench.b) == [("first", [*KIT, NEWS])]
    assert bench.c.heard == []


def test_one_that_does_not_take_the_news_is_given_its_kit_again(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a", "b"])
    bench.a.fails[AdapterRelease] = PeerError("a", "AdapterMismatch", "no")
    assert bench.cluster.notify_devices(["a", "b"], NEWS).keys() == {"a"}
    bench.a.fails.clear()
    assert bench.cluster.ensure_ready(["a", "b"]) == {}
    assert lives(bench.a) == [("first", [*KIT, NEWS, *KIT])]
    assert lives(bench.b) == [("first", [*KIT, NEWS])]


def test_one_that_answers_the_news_with_something_else_is_given_its_kit_again(bench: Bench) -> None:
    bench.cluster.ensure_ready(["a"])
    bench.a.fails[AdapterRelease] = REPORT
    failed = bench.cluster.notify_devices(["a"], NEWS)
    assert isinstance(failed["a"], UnexpectedMessage)
    bench.cluster.ensure_ready(["a"])
    assert lives(bench.a) == [("first", [*KIT, NEWS, *KIT])]
