"""Panels of bars in one picture, to compare several figures of the same things."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gaisnet.runs.plots import BLUE
from gaisnet.runs.table import MISSING

_GREY, _INK = "#b3bac1", "#1f2328"
_COLUMNS, _WIDTH_IN, _AROUND_IN, _BAR_IN = 3, 3.4, 0.7, 0.3
_FAR_APART = 20.0  # largest over smallest; beyond it, short bars could not be told from none
_ROOM = 0.3  # share of a panel's width after the longest bar
_STYLE = {
    "text.color": _INK,
    "axes.edgecolor": _GREY,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.bottom": False,
    "ytick.color": _INK,
    "ytick.major.size": 0,
    "font.size": 9.0,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


@dataclass(frozen=True)
class Bar:
    """Length of a bar, and the ends of its whisker; none below 0."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Panel:
    """One figure of all things, by name; ``None`` for a thing without it."""

    title: str
    bars: Mapping[str, Bar | None]
    show: Callable[[float], str]


def bars_png(title: str, panels: Sequence[Panel], bold: str) -> bytes:
    """Draw all panels, in rows of three; equal values give equal bytes.

    Args:
        title: Title of the picture.
        panels: Panels whose bars have the same names in the same order. A panel with very different bars is
            logarithmic, and says so.
        bold: Name of the bar to emphasize.
    """
    num_rows = math.ceil(len(panels) / _COLUMNS)
    height_in = num_rows * (_AROUND_IN + _BAR_IN * len(panels[0].bars))
    file = BytesIO()
    with style.context(["default", _STYLE]):
        figure = Figure(figsize=(_COLUMNS * _WIDTH_IN, height_in))
        figure.suptitle(title, x=0.01, ha="left", weight="bold")
        every = figure.subplots(num_rows, _COLUMNS, squeeze=False, sharey=True).flat
        for axes, panel in zip(every, panels, strict=False):
            _draw(axes, panel, bold)
        for axes in every[len(panels) :]:
            axes.set_axis_off()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _draw(axes: Axes, panel: Panel, bold: str) -> None:
    bars = list(panel.bars.items())
    ends = [end for _, bar in bars if bar is not None and bar.middle > 0 for end in (bar.middle, bar.high)]
    logarithmic = bool(ends) and max(ends) > _FAR_APART * min(ends)
    _scale(axes, ends, logarithmic)
    axes.set_title(f"{panel.title}, logarithmic" if logarithmic else panel.title, loc="left")
    for place, (name, bar) in enumerate(bars):
        _draw_bar(axes, place, bar, panel.show, BLUE if name == bold else _GREY)
    axes.set_yticks(range(len(bars)), panel.bars)
    axes.set_ylim(len(bars) - 0.5, -0.5)  # the first one on top


def _scale(axes: Axes, ends: Sequence[float], logarithmic: bool) -> None:
    low, high = 0.0, max(ends, default=1.0)
    if logarithmic:
        axes.set_xscale("log")
        low = min(ends) / 4
    right = high * (high / low) ** _ROOM if logarithmic else high * (1 + _ROOM)
    axes.set_xlim(low, right)
    for locate in (axes.xaxis.set_major_locator, axes.xaxis.set_minor_locator):
        locate(NullLocator())  # every bar carries its value


def _draw_bar(axes: Axes, place: int, bar: Bar | None, show: Callable[[float], str], colour: str) -> None:
    """Draw a bar, followed by its value; without a bar, draw the value at the axis."""
    where: dict[str, Any] = {"xy": (0.0, place), "xycoords": axes.get_yaxis_transform()}
    if bar is not None and bar.middle > 0:
        whisker = [[bar.middle - bar.low], [bar.high - bar.middle]]
        looks = {"ecolor": _INK, "elinewidth": 1.2, "capsize": 2.5}
        axes.barh(place, bar.middle, 0.72, xerr=whisker, color=colour, error_kw=looks)
        where = {"xy": (bar.high, place)}
    text = MISSING if bar is None else show(bar.middle)
    axes.annotate(text, **where, xytext=(5, 0), textcoords="offset points", va="center")
