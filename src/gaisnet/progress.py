"""How long work tells that it moves on: a function that is called after every step."""

from collections.abc import Mapping
from typing import Protocol


class Progress(Protocol):
    """Called with what is done, how many steps of how many, and figures worth plotting."""

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Take note."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Take no note."""
