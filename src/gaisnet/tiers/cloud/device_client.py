"""What the cloud can have of devices while it takes adapters in: through their edges, by messages, never an example."""

from collections.abc import Mapping
from typing import Protocol

from gaisnet.messages import BodyOutput, EvaluationReport
from gaisnet.tiers.split.step import Outcome


class DeviceClient(Protocol):
    """Asks the devices of edges that learn."""

    def reports(self, adapters: Mapping[str, str]) -> dict[str, EvaluationReport]:
        """How the FM does on what devices hold back, with an adapter that is plugged in; adapters by domain."""

    def share(self) -> tuple[str, ...]:
        """Let activations of training examples come up, where that is allowed: whose are there now."""

    def labels(self, outputs: Mapping[str, BodyOutput]) -> dict[str, Outcome]:
        """Ask owners for the gradients of their shares of a step, by name; or what came instead."""
