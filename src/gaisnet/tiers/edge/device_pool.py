"""An edge's devices as one: asked side by side, equipped again when they restart, waited for only so long."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from gaisnet.config import FaultSettings
from gaisnet.errors import GaisnetError, LinkLost, LinkTimeout, UnexpectedMessage
from gaisnet.messages import Done, Message
from gaisnet.transport.base import Link, wait

M = TypeVar("M", bound=Message)
_LOOK_S = 0.1
_KITS_AT_ONCE = 4  # a kit can have the size of a model


@dataclass(frozen=True)
class PoolRequest:
    """Requests that are under way, by device."""

    messages: Mapping[str, Message]
    answers: Mapping[str, Future[Message]]


class DevicePool:
    """The devices of one edge.

    Args:
        owner: The edge, for errors.
        links: To the devices, by name.
        faults: Deadlines.
        kit: What a device must be sent before it can work, in order. Asked for whenever one is new or has restarted.
    """

    def __init__(
        self,
        owner: str,
        links: Mapping[str, Link],
        faults: FaultSettings,
        setup_messages: Callable[[str], Sequence[Message]],
    ) -> None:
        self._owner = owner
        self._links = links
        self._faults = faults
        self._setup_messages = setup_messages
        self._equipped: dict[str, str] = {}  # the life of a device that has its kit
        self._given_up: set[str] = set()  # not waited for again until it is back

    def mark_unequipped(self) -> None:
        """Every device is given its kit again before it is next needed."""
        self._equipped.clear()

    def ensure_ready(self, names: Iterable[str]) -> dict[str, GaisnetError]:
        """Give those their kit that lack it, waiting for devices that are away; says which cannot be had, and why."""
        self._given_up = {name for name in self._given_up if not self._links[name].peer}
        until = time.monotonic() + self._faults.away_s  # they are waited for together
        incarnations = {name: self._incarnation(name, until) for name in names}
        missing: dict[str, GaisnetError] = {
            name: self._away(name) for name, incarnation in incarnations.items() if not incarnation
        }
        lacking = [
            name
            for name, incarnation in incarnations.items()
            if incarnation and self._equipped.get(name) != incarnation
        ]
        for first in range(0, len(lacking), _KITS_AT_ONCE):
            missing |= self._equip({name: incarnations[name] for name in lacking[first : first + _KITS_AT_ONCE]})
        return missing

    def ask_devices(
        self, messages: Mapping[str, Message], answer: type[M], deadline_s: float
    ) -> dict[str, M | GaisnetError]:
        """The answers to a message per device, or what came instead."""
        return self.collect_replies(self.send_requests(messages), answer, deadline_s)

    def notify_devices(self, names: Iterable[str], message: Message) -> dict[str, GaisnetError]:
        """The same message for several; says who did not take it, and why."""
        equipped = [name for name in names if name in self._equipped]  # others get it with their kit
        outcomes = self.ask_devices(dict.fromkeys(equipped, message), Done, self._faults.round_deadline_s)
        failed = {name: error for name, error in outcomes.items() if isinstance(error, GaisnetError)}
        for name in failed:
            self._equipped.pop(name, None)
        return failed

    def send_requests(self, messages: Mapping[str, Message]) -> PoolRequest:
        """Ask, and go on meanwhile."""
        return PoolRequest(messages, {name: self._send(name, message) for name, message in messages.items()})

    def collect_replies(self, asked: PoolRequest, answer: type[M], deadline_s: float) -> dict[str, M | GaisnetError]:
        """Wait for what was asked, at most ``deadline_s`` from now for all."""
        until = time.monotonic() + deadline_s
        return {name: self._outcome(name, asked, answer, until) for name in asked.messages}

    def _send(self, name: str, message: Message) -> Future[Message]:
        incarnation = self._links[name].peer
        if not incarnation or self._equipped.get(name) == incarnation:
            return self._links[name].send(message)
        lost: Future[Message] = Future()  # it restarted while nobody asked it for anything
        lost.set_exception(LinkLost(name, "it restarted and has nothing to work with"))
        return lost

    def _outcome(self, name: str, asked: PoolRequest, answer: type[M], until: float) -> M | GaisnetError:
        try:
            try:
                return self._wait(name, asked.answers[name], answer, until - time.monotonic())
            except LinkLost:  # it restarted in the middle: what it was asked for starts again
                again = self._again(name, asked.messages[name])
                return self._wait(name, again, answer, until - time.monotonic())
        except GaisnetError as error:
            if not self._links[name].peer:
                self._given_up.add(name)
            return error

    def _again(self, name: str, message: Message) -> Future[Message]:
        """Ask one that restarted, when it has come back and has its kit. Raises what keeps it from that."""
        incarnation = self._incarnation(name, time.monotonic() + self._faults.away_s)
        if not incarnation:
            raise self._away(name)
        if self._equipped.get(name) != incarnation:
            for error in self._equip({name: incarnation}).values():
                raise error
        return self._links[name].send(message)

    def _equip(self, incarnations: Mapping[str, str]) -> dict[str, GaisnetError]:
        """Give these lives of devices their kits, side by side; says who failed, and why."""
        sent = {
            name: [self._links[name].send(message) for message in self._setup_messages(name)] for name in incarnations
        }
        failed: dict[str, GaisnetError] = {}
        for name, answers in sent.items():
            try:
                for answer in answers:
                    self._wait(name, answer, Done, self._faults.round_deadline_s)
                self._equipped[name] = incarnations[name]
            except GaisnetError as error:
                failed[name] = error
        return failed

    def _away(self, name: str) -> LinkTimeout:
        return LinkTimeout(f"{self._owner} needs device '{name}'", "it is away")

    def _incarnation(self, name: str, until: float) -> str:
        """The present life of a device; '' if it does not come back in time, and it is given up then."""
        while not (incarnation := self._links[name].peer) and name not in self._given_up and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if not incarnation:
            self._given_up.add(name)
        return incarnation

    def _wait(self, name: str, sent: Future[Message], answer: type[M], deadline_s: float) -> M:
        away_s = 0.0 if name in self._given_up else self._faults.away_s
        asked = f"{self._owner}, waiting for a {answer.__name__} of device '{name}'"
        reply = wait(self._links[name], sent, asked, max(deadline_s, 0.0), away_s)
        if not isinstance(reply, answer):
            raise UnexpectedMessage(f"{self._owner}, waiting for a {answer.__name__},", type(reply).__name__)
        return reply
