"""The foundation model (FM) as the cloud runs it: one adapted body, and the parts that depend on the kind of model.

Every FM has a body with adapters and a gate. Only a decoder has a relay trainer and a merger, because both need text
that the model generates. ``decoder_model`` and ``encoder_model`` assemble one each.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import AdapterSpec
from gaisnet.learning.gate import Verdict
from gaisnet.messages import AnchorRelease, ModelRelease
from gaisnet.tiers.cloud.adapted_body import AdaptedBody
from gaisnet.tiers.cloud.merger import Merger
from gaisnet.tiers.cloud.relay_trainer import RelayTrainer


@dataclass(frozen=True)
class Sizes:
    """Layers and parameters of a run's models."""

    foundation_params: int
    foundation_layers: int
    domain_layers: int
    split_device_params: int  # of the largest split device


class Gate(Protocol):
    """Decides whether the FM accepts an adapter.

    Attributes:
        retention: Cost of each accepted adapter in general ability, by its name; empty if it cannot be measured.
    """

    retention: dict[str, float]

    def try_adapter(self, name: str, tensors: AdapterTensors) -> Verdict:
        """Plug an adapter in if the gate accepts it; otherwise the previous one stays."""

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for ``load_state_dict``."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the values of ``state``."""


@dataclass(frozen=True)
class CloudModel:
    """The FM with its adapters.

    Attributes:
        body: The FM's body, on which the adapters sit.
        specs: Shapes of the adapters by name: the domains that train, and ``MERGED`` if there is a merged one.
        gate: Accepts or rejects adapters.
        model_release: Everything that edges and devices need of the FM.
        anchor_release: The FM's hidden states on text that it generated; empty for an encoder.
        sizes: Sizes of the models.
        relay_trainer: Fits relays; None for an encoder.
        merger: Merges adapters; None for an encoder.
    """

    body: AdaptedBody
    specs: Mapping[str, AdapterSpec]
    gate: Gate
    model_release: ModelRelease
    anchor_release: AnchorRelease
    sizes: Sizes
    relay_trainer: RelayTrainer | None = None
    merger: Merger | None = None

    @property
    def relays(self) -> dict[str, AdapterTensors]:
        """Relays by domain; empty if models have none."""
        return self.relay_trainer.relays if self.relay_trainer is not None else {}

    def parts_state(self) -> dict[str, Any]:
        """Return plain values that a run has changed, for ``restore_parts``."""
        return self.gate.state_dict() | (self.relay_trainer.state_dict() if self.relay_trainer is not None else {})

    def restore_parts(self, state: Mapping[str, Any]) -> None:
        """Restore the values of ``state``; adapters and relays are restored by the caller."""
        self.gate.load_state_dict(state)
        if self.relay_trainer is not None:
            self.relay_trainer.load_state_dict(state)
