"""What a cloud needs of its foundation model (FM), whatever that is for: writing text, or telling classes apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import AdapterSpec
from gaisnet.learning.gate import Verdict
from gaisnet.learning.relay import Distillation
from gaisnet.messages import AnchorRelease, ModelRelease, SmashedData
from gaisnet.progress import Progress
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.bounds import GradientBounds
from gaisnet.tiers.split.schedule import TrainingSchedule
from gaisnet.tiers.split.step import Member, RequestGradients
from gaisnet.tiers.split.trainable_body import TrainingResult

MERGED = "merged"


@dataclass(frozen=True)
class Sizes:
    """What a run's models hold, in layers and parameters."""

    foundation_params: int
    foundation_layers: int
    domain_layers: int
    split_device_params: int  # of the largest split device


class CloudModel(Protocol):
    """The FM with the adapters that are plugged in.

    Attributes:
        model_release: What edges and devices need of it.
        anchor_release: What it makes of text that it wrote; empty where it writes none.
        sizes: Of the models.
        names: Of the adapters: those of the domains that learn, and the merged one where there is one.
        relays: What repairs each domain's model, by domain; empty where there is none.
        retention: What each adapter in place costs in general ability, by its name; empty where nobody knows.
    """

    model_release: ModelRelease
    anchor_release: AnchorRelease
    sizes: Sizes
    names: tuple[str, ...]
    relays: dict[str, AdapterTensors]
    retention: dict[str, float]

    def teach(self, domain: str, cycle: int) -> Distillation | None:
        """Fit a domain's relay to what the FM sees; None where there is no relay."""

    def spec(self, name: str) -> AdapterSpec:
        """Shape of an adapter."""

    def adapter(self, name: str) -> AdapterTensors:
        """Copies of an adapter's tensors, as they are plugged in now."""

    def put(self, name: str, tensors: AdapterTensors) -> None:
        """Overwrite an adapter. Raises ``AdapterMismatch``."""

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """Plug an adapter in as the gate lets it; what was there before stays if it does not."""

    def merges(self) -> dict[str, AdapterTensors]:
        """One adapter of all in place, in each way that is to be tried, by its name; none where they cannot be one."""

    def set_gradient_bounds(self, gradient_bounds: GradientBounds) -> None:
        """From now on owners' gradients are held against this."""

    def learn(
        self, members: Sequence[Member], labels: RequestGradients, schedule: TrainingSchedule, progress: Progress
    ) -> TrainingResult:
        """Train the merged adapter; see ``TrainableBody``. Only where adapters can be merged."""

    def publish(self, name: str, version: int) -> None:
        """Serve an adapter as it is now, if the FM answers anybody."""

    def prefix(self, smashed: SmashedData) -> Activations:
        """Finish the frozen layers from where a device stopped. Raises ``WireFormatError`` if that cannot be."""

    def output_rows(self, inputs: Activations, adapter: str | None) -> Tensor:
        """What goes to the owner of examples, of all in order, without gradients."""

    def state(self) -> dict[str, Any]:
        """Plain values that a run has changed, for ``restore``."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where ``state`` was taken; adapters and relays are put in by others."""
