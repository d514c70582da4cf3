"""A figure measured several times."""

from collections.abc import Sequence
from statistics import median
from typing import Self

from pydantic import BaseModel, ConfigDict, Field


class Spread(BaseModel):
    """Median and range over all rounds; no mean, which one slow moment of a shared machine would move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    median: float
    min: float
    max: float
    rounds: int = Field(ge=1, description="How many there were.")

    @classmethod
    def summarize(cls, values: Sequence[float]) -> Self:
        """Summarise values. Raises ``ValueError`` for none."""
        if not values:
            raise ValueError("there is no spread of no values")
        return cls(median=median(values), min=min(values), max=max(values), rounds=len(values))

    def __str__(self) -> str:
        """Return the median and the range as text."""
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"
