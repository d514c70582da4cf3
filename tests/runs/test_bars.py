"""Bars in panels: what is drawn is what was given."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gaisnet.runs.bars import Bar, Panel, _draw, bars_png


def bar(value: float) -> Bar:
    return Bar(value, value * 0.9, value * 1.2)


def panel(*values: float | None) -> Panel:
    bars = {f"thing-{i}": None if value is None else bar(value) for i, value in enumerate(values)}
    return Panel("a figure", bars, lambda value: f"{value:.0f}")


def drawn(shown: Panel) -> Axes:
    axes = Figure().subplots()
    _draw(axes, shown, bold="thing-0")
    return axes


@pytest.mark.parametrize(("values", "scale"), [((1.0, 16.0), "linear"), ((1.0, 21.0), "log"), ((0.0, 21.0), "linear")])
def test_bars_that_are_far_apart_are_logarithmic_and_say_so(values: tuple[float, ...], scale: str) -> None:
    axes = drawn(panel(*values))
    assert axes.get_xscale() == scale
    assert axes.get_title(loc="left").endswith("logarithmic") == (scale == "log")


def test_a_thing_without_the_figure_has_a_place_and_no_bar() -> None:
    axes = drawn(panel(5.0, None, 0.0, 7.0))
    assert [text.get_text() for text in axes.texts] == ["5", "–", "0", "7"]
    assert [round(p.get_width()) for p in axes.patches if isinstance(p, Rectangle)] == [5, 7]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"thing-{i}" for i in range(4)]


def test_every_text_is_within_its_panel() -> None:
    axes = drawn(panel(1_000.0, 999.0))
    low, high = axes.get_xlim()
    assert low == 0.0
    assert high >= 1_200.0 * 1.05  # the longest whisker, and behind it some room


def test_the_same_values_give_the_same_picture(tmp_path: Path) -> None:
    panels = [panel(1.0, 2.0)] * 4
    first, again, other = (bars_png("title", panels, bold) for bold in ("thing-0", "thing-0", "thing-1"))
    assert first == again != other
    (tmp_path / "bars.png").write_bytes(first)
    pixels = matplotlib.image.imread(tmp_path / "bars.png")
    assert pixels.shape[1] > pixels.shape[0] > 200
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 3  # not a blank one
