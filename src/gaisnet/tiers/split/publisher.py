"""Publishers through which tiers hand their bodies and finished adapters to a service."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import ComputeLock
from gaisnet.models.parts import Body


class Publisher(Protocol):
    """A service of a tier's body. Adapters in training are not served, only published copies.

    Attributes:
        compute_lock: The machine's lock; a tier holds it while it runs or changes its body.
    """

    compute_lock: ComputeLock

    def publish_body(self, body: Body, layers: range) -> None:
        """Serve this body, which replaces these FM layers, instead of the previous one."""

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve this version to new sessions. Raises ``AdapterMismatch``."""


class NoPublisher:
    """A publisher for a tier that is not served.

    Args:
        compute_lock: The machine's lock; None for a new one.
    """

    def __init__(self, compute_lock: ComputeLock | None = None) -> None:
        self.compute_lock = compute_lock or ComputeLock()

    def publish_body(self, body: Body, layers: range) -> None:
        """Do nothing."""

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing."""
