"""Progress of long work: a function that is called after every step."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called with the stage, the steps done, the total, and figures worth plotting."""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Report a step."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Ignore progress."""
