"""The network and its three verbs. Read this first.

::

    for cycle in range(config.cycles):
        network.release()  # cloud -> edge -> device: foundation knowledge goes down
        network.fine_tune()  # edge <-> devices: hybrid federated split learning on private data
        network.absorb()  # device -> edge -> cloud: domain knowledge goes up

``evaluate`` may be called anywhere between them. The network runs where the cloud is; edges are behind
links.
"""

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.config import FaultSettings
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import Distillation
from gaisnet.messages import (
    AdapterUpdate,
    Done,
    Evaluate,
    EvaluateGuest,
    EvaluationReport,
    FineTune,
    Install,
    Installed,
    Lengths,
    LengthsOfDevices,
    LengthsRequest,
    Message,
    TrafficReport,
    TrafficRequest,
)
from gaisnet.tiers.cloud.adapted_body import MERGED
from gaisnet.tiers.cloud.cloud import Cloud
from gaisnet.tiers.cloud.edge_client import EdgeClient
from gaisnet.transport.base import Link
from gaisnet.transport.ledger import Ledger, LinkKind, Traffic

M = TypeVar("M", bound=Message)
NO_ADAPTER = "none"
"""Stands for an adapter's name: the FM as it is."""


@dataclass(frozen=True)
class Scores:
    """Scores of the models on the devices' test sets, by domain."""

    domain: dict[str, EvaluationReport]  # every DM on its own domain
    foundation: dict[str, EvaluationReport]  # the FM with the domain's adapter, on every domain that trains
    merged: dict[str, EvaluationReport]  # the FM with the merged adapter, on the same; empty if there is none


@dataclass(frozen=True)
class CrossDomainScores:
    """Scores of every model on every domain: by the model's domain, then by the test set's domain."""

    domain: dict[str, dict[str, EvaluationReport]]  # every DM
    foundation: dict[str, dict[str, EvaluationReport]]  # the FM, by its active adapter, or ``NO_ADAPTER``


class Network:
    """A cloud, and a client of the edges that serve each domain.

    Args:
        cloud: The cloud, in this process.
        edges: The link to each domain's edge.
        ledger: Counts the bytes of the cloud's requests and their replies.
        faults: Deadlines, and the number of edges that a cycle needs.
    """

    def __init__(self, cloud: Cloud, edges: Mapping[str, Link], ledger: Ledger, faults: FaultSettings) -> None:
        self.cloud = cloud
        self.run = uuid.uuid4().hex
        self.edges = EdgeClient(edges, cloud.learning, faults, cloud.check_reply)
        self._ledger = ledger
        self._bytes: dict[str, TrafficReport] = {}  # the last report of each edge
        self._updates: dict[str, AdapterUpdate] = {}
        self._alone: dict[str, EvaluationReport] = {}  # scores of the FM as it is
        self._at_edges: dict[str, AdapterTensors] = {}  # domain adapters of DMs, as far as they are known

    @property
    def cycle(self) -> int:
        """The present cycle, counted from 0."""
        return self.edges.cycle

    @cycle.setter
    def cycle(self, cycle: int) -> None:
        """Continue in this cycle."""
        self.edges.cycle = cycle

    def checkpoint_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return everything that a run needs to resume from here, for ``restore``."""
        state, tensors = self.cloud.checkpoint_state()
        return {"run": self.run, "cycle": self.cycle, "cloud": state}, tensors

    def restore(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Resume from ``state``. Raises ``AdapterMismatch`` for another configuration."""
        self.run, self.cycle = state["run"], state["cycle"]
        self.cloud.restore(state["cloud"], tensors)

    def install(self) -> None:
        """Give every edge what it lacks: its model, its devices' parts, and the current adapters."""
        self._install(self.edges.domains)

    def _install(self, domains: Iterable[str]) -> None:
        order, cloud = Install(self.run, self.cloud.model_digest), self.cloud
        for domain, held in self._ask(dict.fromkeys(domains, order), Installed).items():
            if held.relay != cloud.version("relay", domain):
                self._ask({domain: cloud.adapter_release("relay", domain)}, Done)
            if held.domain != cloud.version("domain", domain):
                release = cloud.adapter_release("domain", domain)
                self._ask({domain: release}, Done)
                self._at_edges[domain] = release.tensors

    def release(self) -> dict[str, Distillation]:
        """Foundation knowledge goes down: relays, fitted to text that the FM generates, go to the DMs that they help.

        Begins a cycle: edges that were left out of the previous one are asked again.
        """
        self.edges.begin_cycle()
        results = {domain: self.cloud.train_relay(domain, self.cycle) for domain in self.edges.domains}
        self.install()
        return {domain: result for domain, result in results.items() if result is not None}

    def fine_tune(self) -> dict[str, AdapterUpdate]:
        """Every edge that has data trains on it with its devices, all edges at once.

        Raises ``TooFewEdges``, or the error of the only edge.
        """
        learning = self.cloud.learning
        self._updates = self._ask(dict.fromkeys(learning, FineTune(self.cycle)), AdapterUpdate)
        self.edges.require(len(self._updates), learning)
        self._at_edges |= {
            domain: update.tensors
            for domain, update in self._updates.items()
            if update.base == self.cloud.version("domain", domain)  # otherwise its DM's adapter is not known
        }
        return self._updates

    def absorb(self) -> list[Verdict]:
        """Domain knowledge goes up: trained adapters are plugged into the FM if the gate accepts them. Ends the cycle.

        Edges that follow a domain have no data of their own: they get accepted adapters at once.
        """
        verdicts = self.cloud.absorb(self._updates, self.cycle, self.edges)
        self._updates = {}
        self.cycle += 1
        self._install([domain for domain in self.edges.domains if domain not in self.cloud.learning])
        return verdicts

    # -- scores --------------------------------------------------------------------------------------------------------

    def evaluate(self) -> Scores:
        """Score every model through the split; only counts and sums come back.

        For edges that follow a domain only the DM is scored: the FM with the same adapter is scored on the test set of
        the domain that they follow. An edge that is left out has no scores.
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
        return self._ask(dict.fromkeys(self.edges.domains, Evaluate("domain", None)), EvaluationReport)

    def evaluate_across_domains(self, scores: Scores) -> CrossDomainScores:
        """Score every model on every domain that trains; ``scores`` are a part of that.

        Adapters travel for it, examples do not.
        """
        learning = self.cloud.learning
        if not self.cycle:  # nothing is trained yet: every model scores as the domain's own
            self._alone = dict(scores.foundation)
            as_own = {on: scores.domain[on] for on in learning if on in scores.domain}
            foundation = dict.fromkeys([*learning, NO_ADAPTER], self._alone)
            return CrossDomainScores(dict.fromkeys(learning, as_own), {**foundation, MERGED: scores.merged})
        domain, foundation = {d: _own_report(scores.domain, d) for d in learning}, {}
        for trained_on in learning:
            others = [on for on in learning if on != trained_on]
            domain[trained_on] |= self._ask(dict.fromkeys(others, self._guest(trained_on)), EvaluationReport)
            asked = dict.fromkeys(others, Evaluate("foundation", trained_on))
            foundation[trained_on] = {
                **_own_report(scores.foundation, trained_on),
                **self._ask(asked, EvaluationReport),
            }
        foundation[MERGED] = scores.merged
        lacking = [on for on in learning if on not in self._alone]  # neither the FM nor the test sets change
        self._alone |= self._ask(dict.fromkeys(lacking, Evaluate("foundation", None)), EvaluationReport)
        foundation[NO_ADAPTER] = self._alone
        return CrossDomainScores(domain, foundation)

    def _guest(self, domain: str) -> EvaluateGuest:
        """Return a domain's DM with its present adapter, even one that the gate has rejected."""
        whole = self.cloud.adapter_release("domain", domain).tensors
        return EvaluateGuest(self.cloud.relay(domain), self._at_edges.get(domain, whole))

    def lengths(self) -> dict[str, dict[str, Lengths]]:
        """Return lengths of devices' examples, by domain and device; devices that are away are missing."""
        found = self._ask(dict.fromkeys(self.edges.domains, LengthsRequest()), LengthsOfDevices)
        return {domain: lengths.by_device() for domain, lengths in found.items()}

    def traffic(self) -> dict[LinkKind, Traffic]:
        """Return the bytes of the whole run on each kind of link, all sites together."""
        self._bytes |= self._ask(dict.fromkeys(self.edges.domains, TrafficRequest()), TrafficReport)
        reports = self._bytes.values()
        devices = sum((Traffic(r.device_edge_up, r.device_edge_down) for r in reports), start=Traffic())
        cloud = sum((Traffic(r.edge_cloud_up, r.edge_cloud_down) for r in reports), start=Traffic())
        return {"device_edge": devices, "edge_cloud": cloud + self._ledger.traffic("edge_cloud")}

    def drain_faults(self) -> list[str]:
        """Return a sentence for every edge that was left out since the last call."""
        return self.edges.drain_faults()

    def _ask(self, messages: Mapping[str, Message], kind: type[M]) -> dict[str, M]:
        return self.edges.ask(messages, kind)


def _own_report(reports: Mapping[str, EvaluationReport], domain: str) -> dict[str, EvaluationReport]:
    """Return a domain's own report, if there is one."""
    return {domain: reports[domain]} if domain in reports else {}
