"""Requests of the cloud to devices while it absorbs adapters: through their edges, by messages, never an example."""

from collections.abc import Mapping
from typing import Protocol

from gaisnet.messages import BodyOutput, EvaluationReport
from gaisnet.tiers.split.step import Outcome


class DeviceClient(Protocol):
    """Asks the devices of edges that train."""

    def collect_reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
        """Score the FM with an adapter in place on devices' validation sets; adapters and reports by domain."""

    def request_activations(self) -> tuple[str, ...]:
        """Let devices that allow it send activations of training examples; return whose are at the cloud now."""

    def request_gradients(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        """Ask owners for the gradients of their rows of a step, by name; an error stands for a missing reply."""
