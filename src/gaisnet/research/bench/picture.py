"""The contest of fine-tuning as a picture."""

from collections.abc import Callable
from pathlib import Path

from gaisnet.checkpoint import write_bytes
from gaisnet.research.bench.contest import LearningFigures
from gaisnet.research.bench.spread import Spread
from gaisnet.runs.bars import Bar, Panel, bars_png

_PANELS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("samples_per_s", "samples/s", lambda v: f"{v:.3g}"),
    ("seconds_to_accuracy", "s until as good as the first", lambda v: f"{v:.3g}"),
    ("accuracy", "accuracy", lambda v: f"{v:.1%}"),
    ("bytes_per_sample", "KiB a sample", lambda v: f"{v / 1024:.1f}"),
    ("device_peak_bytes", "device MiB, at most", lambda v: f"{v / 2**20:.0f}"),
    ("device_flops_per_sample", "device GFLOP a sample", lambda v: f"{v / 1e9:.2f}"),
)


def draw_learning(figures: LearningFigures, path: Path) -> None:
    """Write a PNG with one panel per figure to ``path``. Raises ``OutputNotWritable``."""
    drawn = {name: getattr(figures.contenders, name) for name in type(figures.contenders).model_fields}
    drawn["DM in one piece"] = figures.unsplit_domain_model
    panels = [
        Panel(title, {name: _bar(getattr(own, field, None)) for name, own in drawn.items()}, show)
        for field, title, show in _PANELS
    ]
    epochs, rounds = figures.config["fine_tune"]["local_epochs"], figures.contenders.gaisnet.samples_per_s.rounds
    title = f"{epochs} epochs of {figures.num_examples} examples, on {figures.cores} cores"
    write_bytes(path, bars_png(f"{title}; median, least and most, rounds: {rounds}", panels, bold="gaisnet"))


def _bar(spread: Spread | None) -> Bar | None:
    return None if spread is None else Bar(spread.median, spread.min, spread.max)
