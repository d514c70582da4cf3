"""Plots over the cycles of a run, as SVG elements of an HTML page, drawn by matplotlib.

Names chosen by users never enter a plot: they appear only in the HTML around it. Axes and texts take the page's own
colour (``currentColor``), so they fit light and dark. Equal values give equal bytes.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any

from matplotlib import rc_context, style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from gaisnet.runs.table import MISSING, percent

# The palette of Okabe and Ito, which colour-blind people can tell apart.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
WIDTH_IN, HEIGHT_IN, LABEL_PT = 4.8, 2.8, 11  # of a figure, and the height of a line of text in it
MAX_BAR_LABELS = 6  # more would overlap
INK = "#010203"  # stands for `currentColor`, which matplotlib does not know
INKED = ("axes.edgecolor", "axes.labelcolor", "grid.color", "text.color", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(INKED, INK) | {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, and a screen reader finds it
    "figure.dpi": 72,  # makes a pixel a point, as in an SVG
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.15,
    "font.size": 9.0,
    "lines.linewidth": 2.0,
    "lines.markersize": 5.5,
}


@dataclass(frozen=True)
class Line:
    """A curve over the cycles, or a level across the plot if it has no marker. ``None`` leaves a gap."""

    label: str
    values: Sequence[float | None]
    colour: str
    dash: str = "-"
    marker: str = ""
    show: Callable[[float], str] = percent


@dataclass(frozen=True)
class Stack:
    """One layer of stacked bars: a value per cycle, in bar number ``column`` of the cycle."""

    label: str
    values: Sequence[float]
    colour: str
    show: Callable[[float], str]
    column: int = 0


@dataclass(frozen=True)
class Plot:
    """Curves that share their axes."""

    lines: Sequence[Line]
    unit: str
    limits: tuple[float | None, float | None] = (None, None)
    in_percent: bool = False


@contextmanager
def plain_style() -> Iterator[None]:
    """Make plots look the same inside the context, regardless of the user's matplotlibrc."""
    with style.context(["default", STYLE]):
        yield


def lines_svg(title: str, cycles: Sequence[int], plots: Sequence[Plot]) -> str:
    """Draw curves over the cycles; a second plot stands below the first, and less high."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN * (1.6 if len(plots) > 1 else 1)))
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if len(plots) > 1 else [figure.subplots()]
    for plot, its_axes in zip(plots, axes, strict=True):
        _draw_lines(its_axes, cycles, plot)
    for upper in axes[:-1]:
        upper.set_xlabel("")
    return as_svg(figure, _spoken(title, [line for plot in plots for line in plot.lines]))


def stacks_svg(title: str, cycles: Sequence[int], stacks: Sequence[Stack], unit: str, unit_size: float = 1) -> str:
    """Draw stacked bars over the cycles, with values in units of ``unit_size``."""
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
    _draw_stacks(figure.subplots(), cycles, stacks, unit, unit_size)
    return as_svg(figure, _spoken(title, stacks))


def swatch(series: Line | Stack) -> str:
    """Draw a small sample of ``series`` for the legend."""
    if isinstance(series, Stack):
        shape = f'<path d="M8 0h10v10H8z" fill="{series.colour}"/>'
    else:
        dashes = {"-": "", "--": "6 3", ":": "2 3"}[series.dash]
        shapes = {"o": "M17 5a4 4 0 1 1 0-.01z", "s": "M9 1h8v8h-8z", "^": "M13 1l4 8h-8z", "D": "M13 0l5 5-5 5-5-5z"}
        shape = f'<path d="M0 5h26" stroke="{series.colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
        shape += f'<path d="{shapes.get(series.marker, "")}" fill="{series.colour}"/>'
    return f'<svg width="26" height="10" aria-hidden="true">{shape.replace(INK, "currentColor")}</svg>'


def _spoken(title: str, series: Sequence[Line | Stack]) -> str:
    """Describe the figure in words, for readers who cannot see it."""
    told = []
    for one in series:
        values = ", ".join(MISSING if value is None else one.show(value) for value in one.values)
        told.append(f"{one.label} {values}")
    return f"{title}, by cycle: {'; '.join(told)}"


def _draw_lines(axes: Axes, cycles: Sequence[int], plot: Plot) -> None:
    for line in plot.lines:
        looks: dict[str, Any] = {"color": line.colour, "linestyle": line.dash}
        values = [math.nan if value is None else value for value in line.values]
        if line.marker:
            axes.plot(cycles, values, marker=line.marker, clip_on=False, zorder=3, **looks)
        else:
            axes.axhline(values[0], **looks)
    axes.set(ylabel=plot.unit, ylim=plot.limits)
    if plot.in_percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    _mark_cycles(axes)
    _label_ends(axes, plot.lines)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's last value at the right, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    step = (high - low) * LABEL_PT / axes.bbox.height
    last = [(line.values[-1], line) for line in reversed(lines)]  # of equal values, the first line's is on top
    ends = sorted([(value, line) for value, line in last if value is not None], key=lambda end: end[0])
    place, right_edge = low - step, axes.get_yaxis_transform()
    for index, (value, line) in enumerate(ends):
        room_above = high - (len(ends) - 1 - index) * step
        place = min(max(value, place + step), room_above)
        looks: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "marker": line.marker}
        axes.plot([1.03, 1.06, 1.09], [place] * 3, transform=right_edge, clip_on=False, markevery=[1], **looks)
        axes.text(1.11, place, line.show(value), transform=right_edge, va="center", fontsize=8)


def _draw_stacks(axes: Axes, cycles: Sequence[int], stacks: Sequence[Stack], unit: str, unit_size: float) -> None:
    columns = 1 + max(stack.column for stack in stacks)
    width = 0.7 / columns
    totals = [[0.0] * len(cycles) for _ in range(columns)]
    for stack in stacks:
        below, values = totals[stack.column], [value / unit_size for value in stack.values]
        places = [cycle + (stack.column - (columns - 1) / 2) * width * 1.06 for cycle in cycles]
        axes.bar(places, values, width, bottom=below, color=stack.colour)
        totals[stack.column] = [a + b for a, b in zip(below, values, strict=True)]
        top_of_bar = all(later.column != stack.column for later in stacks[stacks.index(stack) + 1 :])
        if top_of_bar and len(cycles) * columns <= MAX_BAR_LABELS:
            for place, total in zip(places, totals[stack.column], strict=True):
                axes.text(place, total, stack.show(total * unit_size), ha="center", va="bottom", fontsize=7.5)
    axes.margins(y=0.08)
    axes.set_ylabel(f"{unit} per cycle")
    _mark_cycles(axes)


def _mark_cycles(axes: Axes) -> None:
    axes.set_xlabel("cycle")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def as_svg(figure: Figure, spoken: str) -> str:
    """Return the figure as an element of the page; ``spoken`` describes it, uniquely within the page."""
    file = StringIO()
    # Ids of the SVG are hashed with a salt: what is spoken differs between figures, so their ids do too.
    with rc_context({"svg.hashsalt": spoken}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawn = file.getvalue()
    view = re.search(r'viewBox="[^"]*"', drawn)
    inside = drawn[drawn.index("<g ") : drawn.rindex("</svg>")]  # leaves out the XML prologue and a global <style>
    inside = re.sub(r' id="[\w.]+_\d+"', "", inside).replace(INK, "currentColor")
    box = view.group() if view else ""
    return f'<svg role="img" aria-label="{escape(spoken)}" {box}>{inside}</svg>'
