"""Pictures of an experiment: curves with whiskers over the seeds, as SVG in the style of a run's report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from gaisnet.runs.plots import HEIGHT_IN, PALETTE, WIDTH_IN, Line, as_svg, plain_style
from gaisnet.runs.table import percent

_LOOKS = tuple(zip(PALETTE, ("-", "--", ":") * 2, "os^Dos", strict=True))


@dataclass(frozen=True)
class Curve:
    """A figure along the horizontal axis: at each place, one value per seed."""

    label: str
    values: Sequence[tuple[float, Sequence[float]]]

    def means(self) -> list[tuple[float, float]]:
        """Return the mean over the seeds at every place."""
        return [(place, mean(seeds)) for place, seeds in self.values]


@dataclass(frozen=True)
class Drawing:
    """A picture of curves with common axes.

    Attributes:
        title: The heading; unique within a report.
        across: Label of the horizontal axis.
        upward: Label of the vertical axis.
        curves: Six at most.
        show: Formats a value of the vertical axis.
        logarithmic: Whether the horizontal axis is logarithmic.
        in_percent: Whether the vertical axis is in percent.
        ticks: Labels of the horizontal axis, one at every place of a curve.
    """

    title: str
    across: str
    upward: str
    curves: Sequence[Curve]
    show: Callable[[float], str] = percent
    logarithmic: bool = False
    in_percent: bool = True
    ticks: bool = True


def drawn(drawing: Drawing) -> str:
    """Return an SVG element: a line through the means, whiskers from the lowest to the highest seed."""
    with plain_style():
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
        axes = figure.subplots()
        for curve, (colour, dash, marker) in zip(drawing.curves, _LOOKS, strict=False):
            places, means = zip(*curve.means(), strict=True)
            low = [middle - min(seeds) for middle, (_, seeds) in zip(means, curve.values, strict=True)]
            high = [max(seeds) - middle for middle, (_, seeds) in zip(means, curve.values, strict=True)]
            looks: dict[str, Any] = {
                "color": colour,
                "linestyle": dash,
                "marker": marker,
                "capsize": 3,
                "elinewidth": 1.2,
            }
            axes.errorbar(places, means, [low, high], **looks)
        _scale(axes, drawing)
        return as_svg(figure, _spoken(drawing))


def legend_of(drawing: Drawing) -> list[Line]:
    """Return the legend: how each curve is drawn."""
    looks = zip(drawing.curves, _LOOKS, strict=False)
    return [Line(curve.label, [], colour, dash, marker) for curve, (colour, dash, marker) in looks]


def mean(values: Sequence[float]) -> float:
    """Return the mean over the seeds."""
    return math.fsum(values) / len(values)


def _scale(axes: Axes, drawing: Drawing) -> None:
    axes.set(xlabel=drawing.across, ylabel=drawing.upward)
    places = sorted({place for curve in drawing.curves for place, _ in curve.values})
    if drawing.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if drawing.ticks:
        axes.set_xticks(places)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
    if drawing.in_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))


def _spoken(drawing: Drawing) -> str:
    """Describe the picture in words, for readers who cannot see it."""
    told = [
        f"{curve.label} " + ", ".join(f"{drawing.show(middle)} at {place:g}" for place, middle in curve.means())
        for curve in drawing.curves
    ]
    return f"{drawing.title}, by {drawing.across}: {'; '.join(told)}"
