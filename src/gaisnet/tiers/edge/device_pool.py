"""The devices of an edge: requests to all of them in parallel, new kits after a restart, limited waiting."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from gaisnet.config import FaultSettings
from gaisnet.errors import GaisnetError, LinkLost, LinkTimeout
from gaisnet.messages import Done, Message
from gaisnet.transport.base import Link, wait_for

M = TypeVar("M", bound=Message)
_LOOK_S = 0.1
_KITS_AT_ONCE = 4  # a kit can have the size of a model


@dataclass(frozen=True)
class PoolRequest:
    """Requests in flight, by device."""

    messages: Mapping[str, Message]
    replies: Mapping[str, Future[Message]]


class DevicePool:
    """The devices of one edge.

    Args:
        owner: The edge, for errors.
        links: Links to the devices, by name.
        faults: Deadlines.
        setup_messages: Returns the kit of a device: messages that it needs, in order, when it is new or has restarted.
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
        self._equipped: dict[str, str] = {}  # incarnations of devices that have their kits
        self._given_up: set[str] = set()  # not waited for again until it is back

    def mark_unequipped(self) -> None:
        """Send every device its kit again before its next request."""
        self._equipped.clear()

    def ensure_ready(self, names: Iterable[str]) -> dict[str, GaisnetError]:
        """Send kits to devices that lack them, waiting for those that are away. Return errors of the unavailable."""
        self._given_up = {name for name in self._given_up if not self._links[name].peer}
        until = time.monotonic() + self._faults.away_s  # they are waited for together
        incarnations = {name: self._incarnation(name, until) for name in names}
        missing: dict[str, GaisnetError] = {
            name: self._away_error(name) for name, incarnation in incarnations.items() if not incarnation
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
        self, messages: Mapping[str, Message], reply_type: type[M], deadline_s: float
    ) -> dict[str, M | GaisnetError]:
        """Send one message per device and return each reply or error."""
        return self.collect_replies(self.send_requests(messages), reply_type, deadline_s)

    def notify_devices(self, names: Iterable[str], message: Message) -> dict[str, GaisnetError]:
        """Send a message to several devices. Return the errors of those that failed."""
        equipped = [name for name in names if name in self._equipped]  # others get it with their kits
        outcomes = self.ask_devices(dict.fromkeys(equipped, message), Done, self._faults.round_deadline_s)
        failed = {name: error for name, error in outcomes.items() if isinstance(error, GaisnetError)}
        for name in failed:
            self._equipped.pop(name, None)
        return failed

    def send_requests(self, messages: Mapping[str, Message]) -> PoolRequest:
        """Send one message per device without waiting for replies."""
        return PoolRequest(messages, {name: self._send(name, message) for name, message in messages.items()})

    def collect_replies(
        self, requests: PoolRequest, reply_type: type[M], deadline_s: float
    ) -> dict[str, M | GaisnetError]:
        """Wait for replies, at most ``deadline_s`` from now for all together."""
        until = time.monotonic() + deadline_s
        return {name: self._outcome(name, requests, reply_type, until) for name in requests.messages}

    def _send(self, name: str, message: Message) -> Future[Message]:
        incarnation = self._links[name].peer
        if not incarnation or self._equipped.get(name) == incarnation:
            return self._links[name].send(message)
        lost: Future[Message] = Future()  # it restarted between two requests
        lost.set_exception(LinkLost(name, "it restarted and has nothing to work with"))
        return lost

    def _outcome(self, name: str, requests: PoolRequest, reply_type: type[M], until: float) -> M | GaisnetError:
        try:
            try:
                return self._wait(name, requests.replies[name], reply_type, until - time.monotonic())
            except LinkLost:  # it restarted during the request: send it again
                again = self._resend(name, requests.messages[name])
                return self._wait(name, again, reply_type, until - time.monotonic())
        except GaisnetError as error:
            if not self._links[name].peer:
                self._given_up.add(name)
            return error

    def _resend(self, name: str, message: Message) -> Future[Message]:
        """Send a request to a restarted device once it is back and has its kit. Raises where either fails."""
        incarnation = self._incarnation(name, time.monotonic() + self._faults.away_s)
        if not incarnation:
            raise self._away_error(name)
        if self._equipped.get(name) != incarnation:
            for error in self._equip({name: incarnation}).values():
                raise error
        return self._links[name].send(message)

    def _equip(self, incarnations: Mapping[str, str]) -> dict[str, GaisnetError]:
        """Send kits to several devices in parallel. Return the errors of those that failed."""
        sent = {
            name: [self._links[name].send(message) for message in self._setup_messages(name)] for name in incarnations
        }
        failed: dict[str, GaisnetError] = {}
        for name, replies in sent.items():
            try:
                for reply in replies:
                    self._wait(name, reply, Done, self._faults.round_deadline_s)
                self._equipped[name] = incarnations[name]
            except GaisnetError as error:
                failed[name] = error
        return failed

    def _away_error(self, name: str) -> LinkTimeout:
        return LinkTimeout(f"{self._owner} needs device '{name}'", "it is away")

    def _incarnation(self, name: str, until: float) -> str:
        """Return a device's current incarnation; '' if it does not return in time and is given up."""
        while not (incarnation := self._links[name].peer) and name not in self._given_up and time.monotonic() < until:
            time.sleep(_LOOK_S)
        if not incarnation:
            self._given_up.add(name)
        return incarnation

    def _wait(self, name: str, sent: Future[Message], reply_type: type[M], deadline_s: float) -> M:
        away_s = 0.0 if name in self._given_up else self._faults.away_s
        peer = f"device '{name}'"
        return wait_for(self._links[name], sent, reply_type, self._owner, peer, max(deadline_s, 0.0), away_s)
