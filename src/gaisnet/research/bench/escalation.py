"""The gain that the model 'auto' keeps of always asking the foundation model (FM), judged on unseen examples."""

import random
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from gaisnet.config import RoutingSettings
from gaisnet.progress import Progress
from gaisnet.research.bench.spread import Spread
from gaisnet.serving.generation.calibration import Trial, calibrate
from gaisnet.serving.generation.device import AnsweringDevice
from gaisnet.serving.generation.routing import DEFAULT_MEASURE

_HALVINGS = 100
"""Number of splits of the test set, regardless of rounds: they are cheap, and five of so few examples say little."""


class AutoFigures(BaseModel):
    """Figures of the model 'auto' in a domain, or in a mix with other domains' requests.

    Thresholds come from one half of the test set and are judged on the other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    gain_kept: Spread | None = Field(
        description="Share of what always asking the FM gains; null where it gains nothing."
    )
    escalated: Spread = Field(description="Share of the requests that the FM is asked for.")
    accuracy: Spread
    domain_accuracy: Spread = Field(description="Of the DM alone.")
    foundation_accuracy: Spread = Field(description="Of the FM, always asked, with what 'auto' escalates to.")


def measure_auto(device: AnsweringDevice, name: str, progress: Progress) -> dict[str, AutoFigures]:
    """Measure a domain's own requests, and a mix with those of other domains if there are any."""
    settings = RoutingSettings()
    own, others = device.trials(name, settings, DEFAULT_MEASURE, progress)
    mixes = {name: own} | ({f"{name}+others": [*own, *others]} if others else {})
    every = {key: [_halves(mix, seed) for seed in range(_HALVINGS)] for key, mix in mixes.items()}
    return {key: auto_figures(halves, settings) for key, halves in every.items()}


def auto_figures(halves: Sequence[tuple[Sequence[Trial], Sequence[Trial]]], settings: RoutingSettings) -> AutoFigures:
    """Judge thresholds from the first halves on the second halves."""
    found: dict[str, list[float]] = {name: [] for name in AutoFigures.model_fields}
    for known, judged in halves:
        threshold = calibrate(known, settings, DEFAULT_MEASURE).threshold
        for name, value in _on(judged, threshold).items():
            found[name].append(value)
    return AutoFigures(**{name: Spread.summarize(values) if values else None for name, values in found.items()})


def _on(trials: Sequence[Trial], threshold: float) -> Mapping[str, float]:
    total = len(trials)
    alone, always = sum(t.wrong_at is None for t in trials), sum(t.foundation_right for t in trials)
    right = sum(t.right(threshold) for t in trials)
    figures = {
        "accuracy": right / total,
        "escalated": sum(t.escalated(threshold) for t in trials) / total,
        "domain_accuracy": alone / total,
        "foundation_accuracy": always / total,
    }
    return figures | ({"gain_kept": (right - alone) / (always - alone)} if always > alone else {})


def _halves(trials: Sequence[Trial], seed: int) -> tuple[list[Trial], list[Trial]]:
    order = list(trials)
    random.Random(seed).shuffle(order)
    return order[::2], order[1::2]
