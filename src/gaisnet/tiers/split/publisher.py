"""Where a tier puts what is ready to be served: its body, and every version of an adapter that is finished."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.compute_lock import Turn
from gaisnet.models.parts import Body


class Outlet(Protocol):
    """Whoever serves a tier's body. What learns on the body is not served; copies of what it has learned are.

    Attributes:
        turn: Of the machine; a tier holds it while it runs or changes its body.
    """

    turn: Turn

    def put_body(self, body: Body, layers: range) -> None:
        """Serve this body from now on, which stands for these FM layers, and no longer the one before."""

    def put_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve this version to sessions that open from now on. Raises ``AdapterMismatch``."""


class NoOutlet:
    """For a tier that nobody asks for answers.

    Args:
        turn: Of the machine; None for one of its own.
    """

    def __init__(self, turn: Turn | None = None) -> None:
        self.turn = turn or Turn()

    def put_body(self, body: Body, layers: range) -> None:
        """Drop it."""

    def put_adapter(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Drop it."""
