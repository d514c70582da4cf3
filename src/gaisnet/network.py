"""The network and its three verbs: read this first.

::

    for cycle in range(config.cycles):
        network.release()  # cloud -> edge -> device: foundation knowledge goes down
        network.fine_tune()  # edge <-> devices: hybrid federated split learning on private data
        network.absorb()  # device -> edge -> cloud: domain knowledge goes up

``evaluate`` may stand anywhere between them. The network runs where the cloud is; edges are at the other end of links.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import FaultSettings
from gaisnet.errors import GaisnetError, LinkLost, TooFewEdges, UnexpectedMessage
from gaisnet.futures import aside
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import Distillation
from gaisnet.messages import (
    AdapterUpdate,
    BodyOutput,
    BodyOutputGrad,
    Done,
    Evaluate,
    EvaluateGuest,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    LabelRequest,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    Shared,
    ShareRequest,
    TrafficReport,
    TrafficRequest,
)
from gaisnet.tiers.cloud.cloud import Cloud
from gaisnet.tiers.cloud.model import MERGED
from gaisnet.tiers.split.bounds import MAX_SENTENCE
from gaisnet.tiers.split.step import Outcome
from gaisnet.transport.base import Link, wait
from gaisnet.transport.ledger import Ledger, LinkKind, Traffic

M = TypeVar("M", bound=Message)
ALONE = "none"
"""In the place of an adapter's name: the FM as it is."""
_RETRY_S = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """How the models do on the devices' held-out examples, by domain."""

    domain: dict[str, EvaluationReport]  # every DM on its own domain
    foundation: dict[str, EvaluationReport]  # the FM with the domain's adapter, on every domain that learns
    merged: dict[str, EvaluationReport]  # the FM with the one merged adapter, on the same; empty where there is none


@dataclass(frozen=True)
class CrossDomainScores:
    """How every model does on every domain: by whose it is, then by the domain whose held-out examples are scored."""

    domain: dict[str, dict[str, EvaluationReport]]  # every DM
    foundation: dict[str, dict[str, EvaluationReport]]  # the FM, by the adapter that acts; ``ALONE`` for none


class Network:
    """A cloud, and links to the edges that serve each domain.

    Args:
        cloud: In this process.
        edges: Link to the edge of each domain.
        ledger: Counts what the cloud asks, and the answers.
        faults: Deadlines, and how many edges a cycle needs.
    """

    def __init__(self, cloud: Cloud, edges: Mapping[str, Link], ledger: Ledger, faults: FaultSettings) -> None:
        self.cloud = cloud
        self.run = uuid.uuid4().hex
        self.cycle = 0
        self._edges = edges
        self._ledger = ledger
        self._faults = faults
        self._out: dict[str, GaisnetError] = {}  # edges that are left out until the next cycle begins, and why
        self._missed = set[str]()  # edges left out of the cycle before: not waited for again while they are away
        self._faults_of_edges: list[str] = []  # since they were last taken
        self._bytes: dict[str, TrafficReport] = {}  # as each edge reported last
        self._updates: dict[str, AdapterUpdate] = {}
        self._alone: dict[str, EvaluationReport] = {}  # how the FM as it is does
        self._owners: dict[str, str] = {}  # of activations that came up to learn from: devices, and their domains
        self._at_edges: dict[str, AdapterTensors] = {}  # domain adapters that DMs have, as far as they were seen

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a run needs to go on from here, for ``restore``."""
        state, tensors = self.cloud.state()
        return {"run": self.run, "cycle": self.cycle, "cloud": state}, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from where ``state`` was taken. Raises ``AdapterMismatch`` if the configuration is another one."""
        self.run, self.cycle = state["run"], state["cycle"]
        self.cloud.restore(state["cloud"], tensors)

    def install(self) -> None:
        """Every edge gets what it lacks of what its domain model and its devices need, and the present adapters."""
        self._install(self._edges)

    def _install(self, domains: Iterable[str]) -> None:
        order, cloud = Install(self.run, self.cloud.model_digest), self.cloud
        for domain, held in self._ask(dict.fromkeys(domains, order), Installed).items():
            if held.relay != cloud.version("relay", domain):
                self._ask({domain: cloud.release("relay", domain)}, Done)
            if held.domain != cloud.version("domain", domain):
                release = cloud.release("domain", domain)
                self._ask({domain: release}, Done)
                self._at_edges[domain] = release.tensors

    def release(self) -> dict[str, Distillation]:
        """Foundation knowledge goes down: relays, distilled on text that the FM writes, go to DMs that they help.

        Begins a cycle: edges that were left out of the one before are asked again.
        """
        self._missed, self._out = set(self._out), {}
        results = {domain: self.cloud.distil(domain, self.cycle) for domain in self._edges}
        self.install()
        return {domain: result for domain, result in results.items() if result is not None}

    def fine_tune(self) -> dict[str, AdapterUpdate]:
        """Every edge that has data learns from it with its devices, all edges at once.

        Raises ``TooFewEdges``, or why the only one failed.
        """
        learning = self.cloud.learning
        self._updates = self._ask(dict.fromkeys(learning, FineTune(self.cycle)), AdapterUpdate)
        if len(self._updates) < min(self._faults.min_edges, len(learning)):
            raise self._too_few(len(self._updates), {d: e for d, e in self._out.items() if d in learning})
        self._at_edges |= {
            domain: update.tensors
            for domain, update in self._updates.items()
            if update.base == self.cloud.version("domain", domain)  # of others it is not known how far they may be
        }
        return self._updates

    def absorb(self) -> list[Verdict]:
        """Domain knowledge goes up: what was learned is plugged into the FM, where the gate lets it. Ends the cycle.

        Edges that follow a domain have no data of their own: they get at once what was let in.
        """
        verdicts = self.cloud.absorb(self._updates, self.cycle, self)
        self._updates = {}
        self.cycle += 1
        self._install([domain for domain in self._edges if domain not in self.cloud.learning])
        return verdicts

    # -- what the cloud may have of devices meanwhile: see ``tiers.reach`` ---------------------------------------------

    def reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
        """See ``DeviceClient``."""
        asked = {domain: Evaluate("foundation", adapter, "validate") for domain, adapter in adapters.items()}
        return self._ask(asked, EvaluationReport)

    def share(self) -> tuple[str, ...]:
        """See ``DeviceClient``."""
        shared = self._ask(dict.fromkeys(self.cloud.learning, ShareRequest()), Shared)
        self._owners = {owner: domain for domain, reply in shared.items() for owner in reply.owners}
        return tuple(self._owners)

    def labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        """See ``DeviceClient``."""
        requests = {owner: LabelRequest.of(owner, output) for owner, output in outputs.items()}
        sent = {owner: self._edges[self._owners[owner]].send(request) for owner, request in requests.items()}
        until = time.monotonic() + self._faults.edge_deadline_s  # for all: an edge may have many owners
        return {owner: self._outcome(owner, request, sent[owner], until) for owner, request in requests.items()}

    def _outcome(self, owner: str, request: LabelRequest, sent: Future[Message], until: float) -> Outcome:
        try:
            return self._wait(self._owners[owner], request, sent, BodyOutputGrad, until)
        except GaisnetError as error:
            return error

    # -- scores --------------------------------------------------------------------------------------------------------

    def evaluate(self) -> Scores:
        """Score every model through the split; only counts and sums come back.

        Of edges that follow a domain only the DM is scored, for that is the start they have: the FM with the same
        adapters is scored on the examples of the domain that they follow. Of an edge that is left out there is nothing.
        """
        learning = self.cloud.learning
        merging = learning if MERGED in self.cloud.adapters else ()
        return Scores(
            domain=self.evaluate_domain_models(),
            foundation=self._ask({d: Evaluate("foundation", d) for d in learning}, EvaluationReport),
            merged=self._ask(dict.fromkeys(merging, Evaluate("foundation", MERGED)), EvaluationReport),
        )

    def evaluate_domain_models(self) -> dict[str, EvaluationReport]:
        """Score every DM on its own domain."""
        return self._ask(dict.fromkeys(self._edges, Evaluate("domain", None)), EvaluationReport)

    def evaluate_everywhere(self, scores: Scores) -> CrossDomainScores:
        """Score every model on every domain that learns; ``scores`` are a part of that.

        Adapters travel for it, examples do not.
        """
        learning = self.cloud.learning
        if not self.cycle:  # nothing has learned: every model does as the domain's own
            self._alone = dict(scores.foundation)
            as_own = {on: scores.domain[on] for on in learning if on in scores.domain}
            foundation = dict.fromkeys([*learning, ALONE], self._alone)
            return CrossDomainScores(dict.fromkeys(learning, as_own), {**foundation, MERGED: scores.merged})
        domain, foundation = {d: _of(scores.domain, d) for d in learning}, {}
        for whose in learning:
            others = [on for on in learning if on != whose]
            domain[whose] |= self._ask(dict.fromkeys(others, self._guest(whose)), EvaluationReport)
            asked = dict.fromkeys(others, Evaluate("foundation", whose))
            foundation[whose] = {**_of(scores.foundation, whose), **self._ask(asked, EvaluationReport)}
        foundation[MERGED] = scores.merged
        lacking = [on for on in learning if on not in self._alone]  # it never changes, nor does what is held out
        self._alone |= self._ask(dict.fromkeys(lacking, Evaluate("foundation", None)), EvaluationReport)
        foundation[ALONE] = self._alone
        return CrossDomainScores(domain, foundation)

    def _guest(self, domain: str) -> EvaluateGuest:
        """A domain's DM with the adapter that it has now, also one that the gate has refused."""
        whole = self.cloud.release("domain", domain).tensors
        return EvaluateGuest(self.cloud.relay(domain), self._at_edges.get(domain, whole))

    def lengths(self) -> dict[str, dict[str, Lengths]]:
        """How long devices' examples are, by domain and device; those that are away are missing."""
        found = self._ask(dict.fromkeys(self._edges, LengthsRequest()), LengthsOfDevices)
        return {domain: lengths.by_device() for domain, lengths in found.items()}

    def traffic(self) -> dict[LinkKind, Traffic]:
        """Bytes of the whole run on each kind of link, all sites together."""
        self._bytes |= self._ask(dict.fromkeys(self._edges, TrafficRequest()), TrafficReport)
        reports = self._bytes.values()
        devices = sum((Traffic(r.device_edge_up, r.device_edge_down) for r in reports), start=Traffic())
        cloud = sum((Traffic(r.edge_cloud_up, r.edge_cloud_down) for r in reports), start=Traffic())
        return {"device_edge": devices, "edge_cloud": cloud + self._ledger.traffic("edge_cloud")}

    # -- asking edges --------------------------------------------------------------------------------------------------

    def take_faults(self) -> list[str]:
        """A sentence for every edge that was left out since this was last called."""
        taken, self._faults_of_edges = self._faults_of_edges, []
        return taken

    def _ask(self, messages: Mapping[str, Message], answer: type[M]) -> dict[str, M]:
        """Ask several edges at once, by domain; one that fails is left out until the next cycle begins, and named.

        Raises ``TooFewEdges``, or why the only one failed.
        """
        asked = {domain: message for domain, message in messages.items() if domain not in self._out}
        sent = {domain: self._edges[domain].send(message) for domain, message in asked.items()}
        until = time.monotonic() + self._faults.edge_deadline_s
        # Side by side: one that restarts is asked again at once, also while another one hangs.
        replies = {d: self._awaited(d, message, sent[d], answer, until) for d, message in asked.items()}
        found, failed = dict[str, M](), dict[str, GaisnetError]()
        for domain, message in asked.items():
            try:
                found[domain] = replies[domain].result()
                self.cloud.check(domain, message, found[domain])
                self._missed.discard(domain)
            except GaisnetError as error:
                found.pop(domain, None)
                failed[domain] = error
        self._leave_out(failed, answer)
        return found

    def _leave_out(self, failed: Mapping[str, GaisnetError], answer: type[Message]) -> None:
        left = len(self._edges) - len(self._out) - len(failed)
        if failed and left < self._faults.min_edges:
            raise self._too_few(left, {**self._out, **failed})
        self._out |= failed
        for domain, error in failed.items():
            said = f"{domain}: cycle {self.cycle}: without its edge, which owed an answer ({answer.__name__}): {error}"
            self._faults_of_edges.append(said[:MAX_SENTENCE])
            _log.warning("%s", self._faults_of_edges[-1])

    def _too_few(self, left: int, failed: Mapping[str, GaisnetError]) -> GaisnetError:
        if len(self._edges) == 1:  # its own error says it all
            return next(iter(failed.values()))
        reasons = "; ".join(f"{domain}: {error}" for domain, error in failed.items())
        return TooFewEdges(self._faults.min_edges, left, reasons)

    def _awaited(
        self, domain: str, message: Message, sent: Future[Message], answer: type[M], until: float
    ) -> Future[M]:
        """Wait in a thread of its own."""
        return aside(lambda _: self._wait(domain, message, sent, answer, until))

    def _wait(self, domain: str, message: Message, sent: Future[Message], answer: type[M], until: float) -> M:
        link = self._edges[domain]
        asked = f"the cloud, waiting for a {answer.__name__} of the edge of '{domain}'"
        while True:
            left_s = max(until - time.monotonic(), 0.0)
            try:
                away_s = min(left_s, self._faults.away_s) if domain in self._missed else left_s
                reply = wait(link, sent, asked, left_s, away_s)
            except LinkLost:  # a site on the way restarted; an order that was carried out is not carried out again
                if left_s <= 0.0:
                    raise
                time.sleep(_RETRY_S)
                sent = link.send(message)
                continue
            if not isinstance(reply, answer):
                raise UnexpectedMessage(f"the network, waiting for a {answer.__name__},", type(reply).__name__)
            return reply


def _of(reports: Mapping[str, EvaluationReport], domain: str) -> dict[str, EvaluationReport]:
    """A domain's own, if there is one."""
    return {domain: reports[domain]} if domain in reports else {}
