"""Queries over rows: rows of a condition, figures over its values or along curves, pairs of conditions."""

from collections.abc import Sequence

from gaisnet.research.paper.experiment import Condition, Row, Value
from gaisnet.research.paper.figures import Curve, mean

Pairs = list[tuple[float, float]]
"""Pairs of a figure in two conditions, one pair per seed."""


def having(rows: Sequence[Row], part: Condition) -> list[Row]:
    """Return the rows whose condition has all values of ``part``."""
    return [row for row in rows if part.items() <= row.condition.items()]


def curve_over(across: str, rows: Sequence[Row], figure: str, label: str) -> Curve:
    """Return a figure over the number that the condition gives for ``across``, with every seed's value."""
    values: dict[float, list[float]] = {}
    for row in rows:
        values.setdefault(float(row.condition[across]), []).append(row.figures[figure])
    return Curve(label, sorted(values.items()))


def curve_along(across: str, rows: Sequence[Row], upward: str, label: str, unit: float = 1.0) -> Curve:
    """Return a figure along the rows' own curves: the seeds' mean position in ``unit``, and their values."""
    places = [mean(at) / unit for at in zip(*(row.curves[across] for row in rows), strict=True)]
    values = zip(*(row.curves[upward] for row in rows), strict=True)
    return Curve(label, list(zip(places, values, strict=True)))


def mean_of(rows: Sequence[Row], part: Condition, figure: str) -> float:
    """Return the mean over all rows whose condition has all values of ``part``."""
    return mean([row.figures[figure] for row in having(rows, part)])


def paired(rows: Sequence[Row], by: str, one: Value, other: Value, figure: str) -> list[tuple[Condition, Pairs]]:
    """Pair a figure between conditions that differ only in ``by``: ``one`` against ``other``.

    Other values of the conditions keep the order of ``rows``. Raises ``KeyError`` if a counterpart is missing.
    """
    values = {row.key: row.figures[figure] for row in rows}
    found: dict[str, tuple[Condition, Pairs]] = {}
    for row in having(rows, {by: one}):
        counterpart = row.model_copy(update={"condition": {**row.condition, by: other}})
        rest = {name: value for name, value in row.condition.items() if name != by}
        found.setdefault(str(rest), (rest, []))[1].append((values[row.key], values[counterpart.key]))
    return list(found.values())
