"""Where a tier puts what is ready to be served: its body, and every version of an adapter that is finished."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import ComputeLock
from gaisnet.models.parts import Body


class Publisher(Protocol):
    """Whoever serves a tier's body. What learns on the body is not served; copies of what it has learned are.

    Attributes:
        compute_lock: Of the machine; a tier holds it while it runs or changes its body.
    """

    compute_lock: ComputeLock

    def publish_body(self, body: Body, layers: range) -> None:
        """Serve this body from now on, which stands for these FM layers, and no longer the one before."""

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve this version to sessions that open from now on. Raises ``AdapterMismatch``."""


class NoPublisher:
    """For a tier that nobody asks for answers.

    Args:
        compute_lock: Of the machine; None for one of its own.
    """

    def __init__(self, compute_lock: ComputeLock | None = None) -> None:
        self.compute_lock = compute_lock or ComputeLock()

    def publish_body(self, body: Body, layers: range) -> None:
        """Drop it."""

    def publish_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Drop it."""
