"""What an experiment is: a claim of the paper's, conditions, and what is measured in each of them with every seed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from gaisnet.data.images import ImageData, load_images
from gaisnet.progress import Progress, silent
from gaisnet.research.paper.claims import Claim, Finding
from gaisnet.research.paper.figures import Drawing
from gaisnet.research.paper.foundation import FULL, QUICK, pretrained

SEEDS = (0, 1, 2)
"""Every condition is measured with each of them."""

Value = str | int | float
Condition = dict[str, Value]
"""What is the same in the rows that are told apart by their seeds only, by its name in the table."""


class Measured(BaseModel):
    """What was measured once."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    figures: dict[str, float] = Field(description="By name.")
    curves: dict[str, tuple[float, ...]] = Field(default={}, description="By name, such as a value per edge round.")


class Row(Measured):
    """What was measured in a condition with a seed."""

    condition: Condition
    seed: int
    seconds: float

    @property
    def key(self) -> str:
        """The same for the same condition and seed."""
        return unit_key(self.condition, self.seed)


def unit_key(condition: Condition, seed: int) -> str:
    """What tells a row from all others of its experiment."""
    return json.dumps([condition, seed], sort_keys=True)


@dataclass(frozen=True)
class Column:
    """A figure in the table: its heading, and a value of it as text."""

    heading: str
    show: Callable[[float], str]


@dataclass(frozen=True)
class Setup:
    """What experiments share.

    Attributes:
        quick: Do less of everything; the result is there in minutes, and worth less.
        progress: Told what goes on.
    """

    quick: bool = False
    progress: Progress = silent
    _loaded: dict[str, ImageData] = field(default_factory=dict, init=False, repr=False, compare=False)

    def foundation(self) -> Path:
        """The folder of the pre-trained ViT. Raises what ``load_images`` and ``pretrained`` do."""
        return pretrained(QUICK if self.quick else FULL, self.images("fashion").train, self.progress)

    def images(self, name: str) -> ImageData:
        """See ``load_images``; read once."""
        if name not in self._loaded:
            self._loaded[name] = load_images(name)
        return self._loaded[name]


@dataclass(frozen=True)
class Experiment:
    """One of ``gaisnet paper``.

    Attributes:
        name: In the command and in file names.
        title: Above its section of the report.
        claim: Of the paper's.
        method: What is done, in a few sentences.
        rule: How the figures become a verdict, in words; ``judge`` does it.
        data: Names of the images that it reads: what is missing is told before anything is measured.
        conditions: What is measured, with every seed; with True, of a quick run.
        measure: Once, in a condition with a seed.
        columns: Of the table, by name of the figure.
        judge: All rows of all conditions, to a finding.
        draw: The same, to pictures.
    """

    name: str
    title: str
    claim: Claim
    method: str
    rule: str
    data: Sequence[str]
    conditions: Callable[[bool], Sequence[Condition]]
    measure: Callable[[Condition, int, Setup], Measured]
    columns: Mapping[str, Column]
    judge: Callable[[Sequence[Row]], Finding]
    draw: Callable[[Sequence[Row]], Sequence[Drawing]]

    def units(self, quick: bool) -> dict[str, tuple[Condition, int]]:
        """Every condition with every seed, seed by seed, by the key of their row."""
        every = product(SEEDS, self.conditions(quick))
        return {unit_key(condition, seed): (condition, seed) for seed, condition in every}
