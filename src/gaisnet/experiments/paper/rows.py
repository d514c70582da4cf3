"""Rows put beside each other: those of a condition, a figure over one of its values, two conditions seed by seed."""

from collections.abc import Sequence

from gaisnet.experiments.paper.experiment import Condition, Row
from gaisnet.experiments.paper.figures import Curve

Pairs = list[tuple[float, float]]
"""A figure in one condition and in another, with the same seed; a pair for each."""


def having(rows: Sequence[Row], part: Condition) -> list[Row]:
    """Those whose condition has all values of ``part``."""
    return [row for row in rows if part.items() <= row.condition.items()]


def curve_over(across: str, rows: Sequence[Row], figure: str, label: str) -> Curve:
    """A figure over what the condition says of ``across``, a number; every seed's value of it."""
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(float(row.condition[across]), []).append(row.figures[figure])
    return Curve(label, sorted(values.items()))


def paired(rows: Sequence[Row], by: str, one: str, other: str, figure: str) -> list[tuple[Condition, Pairs]]:
    """A figure where the condition says ``one`` of ``by`` and where it says ``other``, all else being the same.

    What else there is of the conditions comes in the order of ``rows``. Raises ``KeyError`` where there is no other.
    """
    values = {row.key: row.figures[figure] for row in rows}
    found: dict[str, tuple[Condition, Pairs]] = {}
    for row in having(rows, {by: one}):
        counterpart = row.model_copy(update={"condition": {**row.condition, by: other}})
        rest = {name: value for name, value in row.condition.items() if name != by}
        found.setdefault(str(rest), (rest, []))[1].append((values[row.key], values[counterpart.key]))
    return list(found.values())
