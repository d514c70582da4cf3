"""An experiment: a claim of the paper, conditions, and a measurement per condition and seed."""

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
"""Seeds with which every condition is measured."""

Value = str | int | float
Condition = dict[str, Value]
"""Figures that rows differing only by seed have in common, by their name in the table."""


class Measured(BaseModel):
    """One measurement."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    figures: dict[str, float] = Field(description="By name.")
    curves: dict[str, tuple[float, ...]] = Field(default={}, description="By name, such as a value per edge round.")


class Row(Measured):
    """One measurement of a condition with a seed."""

    condition: Condition
    seed: int
    seconds: float

    @property
    def key(self) -> str:
        """Return a key that is equal for equal condition and seed."""
        return unit_key(self.condition, self.seed)


def unit_key(condition: Condition, seed: int) -> str:
    """Return a key that is unique within the experiment."""
    return json.dumps([condition, seed], sort_keys=True)


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, and a function that formats a value."""

    heading: str
    show: Callable[[float], str]


@dataclass(frozen=True)
class Setup:
    """Inputs that experiments share.

    Attributes:
        quick: Measure less of everything, in minutes; results are rougher.
        progress: Told about every step.
    """

    quick: bool = False
    progress: Progress = silent
    _loaded: dict[str, ImageData] = field(default_factory=dict, init=False, repr=False, compare=False)

    def foundation(self) -> Path:
        """Return the folder of the pre-trained ViT. Raises the errors of ``load_images`` and ``pretrained``."""
        return pretrained(QUICK if self.quick else FULL, self.images("fashion").train, self.progress)

    def images(self, name: str) -> ImageData:
        """Return the images (see ``load_images``), read once."""
        if name not in self._loaded:
            self._loaded[name] = load_images(name)
        return self._loaded[name]


@dataclass(frozen=True)
class Experiment:
    """An experiment of ``gaisnet paper``.

    Attributes:
        name: Its name in the command and in file names.
        title: The heading of its section of the report.
        claim: The paper's claim.
        method: The procedure, in a few sentences.
        rule: The rule that turns figures into a verdict, in words; ``judge`` implements it.
        data: Image sets that it needs; missing ones are reported before anything is measured.
        conditions: Returns the conditions to measure with every seed; True asks for those of a quick run.
        measure: Measures one condition with one seed.
        columns: Columns of the table, by the name of the figure.
        judge: Turns the rows of all conditions into a finding.
        draw: Turns the same rows into pictures.
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
        """Return every condition with every seed, seed by seed, by the key of their row."""
        every = product(SEEDS, self.conditions(quick))
        return {unit_key(condition, seed): (condition, seed) for seed, condition in every}
