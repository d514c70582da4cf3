"""Requests of the cloud to its edges, and through them to their devices: deadlines, retries, and who is left out."""

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from gaisnet.config import FaultSettings
from gaisnet.errors import GaisnetError, LinkLost, TooFewEdges
from gaisnet.futures import aside
from gaisnet.messages import (
    BodyOutput,
    BodyOutputGrad,
    Evaluate,
    EvaluationReport,
    LabelRequest,
    Message,
    Shared,
    ShareRequest,
)
from gaisnet.tiers.split.bounds import MAX_SENTENCE
from gaisnet.tiers.split.step import Outcome
from gaisnet.transport.base import Link, wait_for

M = TypeVar("M", bound=Message)
_RETRY_S = 0.5
_log = logging.getLogger(__name__)


class EdgeClient:
    """Asks edges by their domains. An edge that fails is left out until the next cycle begins, and named.

    Args:
        links: The link to each domain's edge.
        training: Domains whose edges have data to train on.
        faults: Deadlines, and the number of edges that a cycle needs.
        check: Raises an error if an edge's reply (domain, request, reply) cannot be true.

    Attributes:
        cycle: The present cycle, for sentences about faults.
        failed: Edges that are left out until the next cycle begins, and why, by domain.
    """

    def __init__(
        self,
        links: Mapping[str, Link],
        training: Collection[str],
        faults: FaultSettings,
        check: Callable[[str, Message, Message], None],
    ) -> None:
        self.links = links
        self.cycle = 0
        self.failed: dict[str, GaisnetError] = {}
        self._training = training
        self._faults = faults
        self._check = check
        self._missed = set[str]()  # left out of the previous cycle: not waited for again while they are away
        self._sentences: list[str] = []
        self._owners: dict[str, str] = {}  # devices whose activations are at the cloud, and their domains

    @property
    def domains(self) -> Iterable[str]:
        """The domains of all edges."""
        return self.links

    def begin_cycle(self) -> None:
        """Ask edges again that were left out of the previous cycle."""
        self._missed, self.failed = set(self.failed), {}

    def drain_faults(self) -> list[str]:
        """Return a sentence for every edge that was left out since the last call."""
        drained, self._sentences = self._sentences, []
        return drained

    def ask(self, messages: Mapping[str, Message], kind: type[M]) -> dict[str, M]:
        """Ask several edges at once, by domain; return the replies of those that did not fail.

        Raises ``TooFewEdges``, or the error of the only edge.
        """
        asked = {domain: message for domain, message in messages.items() if domain not in self.failed}
        sent = {domain: self.links[domain].send(message) for domain, message in asked.items()}
        until = time.monotonic() + self._faults.edge_deadline_s
        # Each in a thread of its own: one that restarts is asked again at once, also while another one hangs.
        replies = {d: self._wait_aside(d, message, sent[d], kind, until) for d, message in asked.items()}
        found, failed = dict[str, M](), dict[str, GaisnetError]()
        for domain, message in asked.items():
            try:
                found[domain] = replies[domain].result()
                self._check(domain, message, found[domain])
                self._missed.discard(domain)
            except GaisnetError as error:
                found.pop(domain, None)
                failed[domain] = error
        self._leave_out(failed, kind)
        return found

    def require(self, num_found: int, domains: Collection[str]) -> None:
        """Raise ``TooFewEdges``, or the error of the only edge, if fewer than ``faults.min_edges`` of these replied."""
        if num_found < min(self._faults.min_edges, len(domains)):
            raise self._too_few(num_found, {d: error for d, error in self.failed.items() if d in domains})

    # -- devices, through their edges: see ``DeviceClient`` ------------------------------------------------------------

    def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
        """Score the FM with adapters in place on devices' validation sets, by domain."""
        asked = {domain: Evaluate("foundation", adapter, "validate") for domain, adapter in adapters.items()}
        return self.ask(asked, EvaluationReport)

    def request_activations(self) -> tuple[str, ...]:
        """Let devices send activations of training examples; return whose are at the cloud now."""
        shared = self.ask(dict.fromkeys(self._training, ShareRequest()), Shared)
        self._owners = {owner: domain for domain, reply in shared.items() for owner in reply.owners}
        return tuple(self._owners)

    def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        """Ask owners for the gradients of their rows, by name; an error stands for a missing reply."""
        requests = {owner: LabelRequest.from_output(owner, output) for owner, output in outputs.items()}
        sent = {owner: self.links[self._owners[owner]].send(request) for owner, request in requests.items()}
        until = time.monotonic() + self._faults.edge_deadline_s  # for all: an edge may have many owners

        def outcome(owner: str) -> Outcome:
            try:
                return self._wait(self._owners[owner], requests[owner], sent[owner], BodyOutputGrad, until)
            except GaisnetError as error:
                return error

        return {owner: outcome(owner) for owner in requests}

    # -- waiting -------------------------------------------------------------------------------------------------------

    def _wait(self, domain: str, message: Message, sent: Future[Message], kind: type[M], until: float) -> M:
        link, peer = self.links[domain], f"the edge of '{domain}'"
        while True:
            left_s = max(until - time.monotonic(), 0.0)
            try:
                away_s = min(left_s, self._faults.away_s) if domain in self._missed else left_s
                return wait_for(link, sent, kind, "the cloud", peer, left_s, away_s)
            except LinkLost:  # a site on the way restarted; an order that was executed is not executed again
                if left_s <= 0.0:
                    raise
                time.sleep(_RETRY_S)
                sent = link.send(message)

    def _wait_aside(
        self, domain: str, message: Message, sent: Future[Message], kind: type[M], until: float
    ) -> Future[M]:
        return aside(lambda _: self._wait(domain, message, sent, kind, until))

    def _leave_out(self, failed: Mapping[str, GaisnetError], kind: type[Message]) -> None:
        left = len(self.links) - len(self.failed) - len(failed)
        if failed and left < self._faults.min_edges:
            raise self._too_few(left, {**self.failed, **failed})
        self.failed |= failed
        for domain, error in failed.items():
            sentence = (
                f"{domain}: cycle {self.cycle}: without its edge, which owed an answer ({kind.__name__}): {error}"
            )
            self._sentences.append(sentence[:MAX_SENTENCE])
            _log.warning("%s", self._sentences[-1])

    def _too_few(self, left: int, failed: Mapping[str, GaisnetError]) -> GaisnetError:
        if len(self.links) == 1:  # its own error says it all
            return next(iter(failed.values()))
        reasons = "; ".join(f"{domain}: {error}" for domain, error in failed.items())
        return TooFewEdges(self._faults.min_edges, left, reasons)
