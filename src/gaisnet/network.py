"""The network and its three verbs: read this first.

::

    for cycle in range(config.cycles):
        network.release()  # cloud -> edge -> device: foundation knowledge goes down
        network.fine_tune()  # edge <-> devices: hybrid federated split learning on private data
        network.absorb()  # device -> edge -> cloud: domain knowledge goes up

``evaluate`` may stand anywhere between them. The network runs where the cloud is; edges are at the other end of links.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from gaisnet.errors import UnexpectedMessage
from gaisnet.messages import AdapterUpdate, Done, Evaluate, EvaluationReport, FineTune, Message
from gaisnet.relay.downward import Distillation
from gaisnet.relay.upward import Verdict
from gaisnet.tiers.cloud import MERGED, Cloud
from gaisnet.transport.base import Link
from gaisnet.transport.ledger import Ledger

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Scores:
    """How the models do on the devices' held-out examples, by domain."""

    domain: dict[str, EvaluationReport]  # every DM on its own domain
    foundation: dict[str, EvaluationReport]  # the FM with the domain's adapter
    merged: dict[str, EvaluationReport]  # the FM with the one merged adapter


class Network:
    """A cloud, and links to the edges that serve each domain.

    Args:
        cloud: In this process.
        edges: Link to the edge of each domain.
        ledger: Counts what crosses the links.
    """

    def __init__(self, cloud: Cloud, edges: Mapping[str, Link], ledger: Ledger) -> None:
        self.cloud = cloud
        self.ledger = ledger
        self._edges = edges
        self._cycle = 0
        self._updates: dict[str, AdapterUpdate] = {}

    def install(self) -> None:
        """Once: every edge gets what its domain model and its devices need, and the domain adapter to start from."""
        for domain, link in self._edges.items():
            _ask(link, self.cloud.model_release, Done)
            _ask(link, self.cloud.domain_release(domain), Done)
            _ask(link, self.cloud.anchor_release, Done)

    def release(self) -> dict[str, Distillation]:
        """Foundation knowledge goes down: relays, distilled on text that the FM writes, go to DMs that they help."""
        results = {}
        for domain, link in self._edges.items():
            relayed = self.cloud.relay_release(domain, self._cycle)
            if relayed is not None:
                relay, results[domain] = relayed
                if results[domain].helped:
                    _ask(link, relay, Done)
        return results

    def fine_tune(self) -> dict[str, AdapterUpdate]:
        """Every edge and its devices learn from private data."""
        self._updates = {
            domain: _ask(link, FineTune(self._cycle), AdapterUpdate) for domain, link in self._edges.items()
        }
        return self._updates

    def absorb(self) -> list[Verdict]:
        """Domain knowledge goes up: what was learned is plugged into the FM, where the gate lets it. Ends the cycle."""
        verdicts = self.cloud.absorb(self._updates)
        self._updates = {}
        self._cycle += 1
        return verdicts

    def evaluate(self) -> Scores:
        """Score every model through the split; only counts and sums come back."""
        return Scores(
            domain={d: _ask(link, Evaluate("domain", None), EvaluationReport) for d, link in self._edges.items()},
            foundation={d: _ask(link, Evaluate("foundation", d), EvaluationReport) for d, link in self._edges.items()},
            merged={d: _ask(link, Evaluate("foundation", MERGED), EvaluationReport) for d, link in self._edges.items()},
        )


def _ask(link: Link, message: Message, answer: type[M]) -> M:
    reply = link.request(message)
    if not isinstance(reply, answer):
        raise UnexpectedMessage(f"the network, waiting for a {answer.__name__},", type(reply).__name__)
    return reply
