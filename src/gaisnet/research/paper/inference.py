"""Split inference at every cut: time of each part, bytes on the link, and latency over links of several speeds."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from gaisnet.config import TensorCode
from gaisnet.research.paper.claims import INFERENCE, Finding, verdict_of
from gaisnet.research.paper.classifier import pretrained_classifier
from gaisnet.research.paper.experiment import Column, Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Drawing
from gaisnet.research.paper.latency import Crossing, Cut, Link
from gaisnet.research.paper.rows import curve_over, having
from gaisnet.runs.table import human_bytes

_SMALL, _BASE = "small ViT", "ViT-Base"
_LAYERS = {_SMALL: 6, _BASE: 12}
_REPEATS = {_SMALL: 30, _BASE: 5}
_AT_DEVICE = "layers at the device"
_CODES: tuple[TensorCode, ...] = ("int4", "float32")
_LINKS = (Link(1), Link(10), Link(100))
_NUM_CLASSES = 10
_NOTHING = Crossing(0.0, 0.0, 0, 0)


def _conditions(quick: bool) -> Sequence[Condition]:
    step = {_SMALL: 1, _BASE: 6 if quick else 1}
    return [
        {"model": model, _AT_DEVICE: num}
        for model, num_layers in _LAYERS.items()
        for num in range(0, num_layers + 1, step[model])
    ]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    name, num = str(condition["model"]), int(condition[_AT_DEVICE])
    is_split = num < _LAYERS[name]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = _model(name, setup)
        config: Any = model.config
        pixels = torch.randn(1, config.num_channels, config.image_size, config.image_size)
    cut = Cut.after(model, num if is_split else 0, pixels, _REPEATS[name])
    head_s, body_s, classifier_s = cut.compute()
    if not is_split:
        head_s, body_s, classifier_s = head_s + body_s + classifier_s, 0.0, 0.0
    figures = {"device_s": head_s, "body_s": body_s, "classifier_s": classifier_s, "pixel_bytes": pixels.numel()}
    for code in _CODES:
        crossing = cut.crossing(code) if is_split else _NOTHING
        figures[f"up_bytes {code}"] = crossing.up_bytes
        at_device_s, at_edge_s = head_s + crossing.at_device_s, body_s + classifier_s + crossing.at_edge_s
        both_bytes = crossing.up_bytes + crossing.down_bytes
        figures |= {_latency(code, link): link.seconds(at_device_s, at_edge_s, both_bytes) for link in _LINKS}
    return Measured(figures=figures)


def _model(name: str, setup: Setup) -> ViTForImageClassification:
    if name == _SMALL:
        return pretrained_classifier(setup.foundation(), _NUM_CLASSES)
    config = ViTConfig()  # transformers' defaults are ViT-Base/16
    config.num_labels = _NUM_CLASSES
    return ViTForImageClassification(config)


def _latency(code: TensorCode, link: Link) -> str:
    return f"latency_s {code} {link.mbit_per_s:g}"


def _judge(rows: Sequence[Row]) -> Finding:
    holds, told = [], []
    for model, code in product(_LAYERS, _CODES):
        best = [_best(having(rows, {"model": model}), _latency(code, link)) for link in _LINKS]
        holds.append(len({num for num, _ in best}) > 1)
        told.append(f"{model} in {code}: {'; '.join(map(_told, best, _LINKS, [model] * len(best)))}")
    return Finding(verdict_of(holds), f"Least latency, and the cut that has it. {'. '.join(told)}. {_why(rows)}")


def _best(rows: Sequence[Row], figure: str) -> tuple[float, float]:
    """Return the cut with the lowest mean latency, and that mean."""
    return min(curve_over(_AT_DEVICE, rows, figure, figure).means(), key=lambda place: place[1])


def _told(best: tuple[float, float], link: Link, model: str) -> str:
    num, seconds = best
    where = "all at the device" if num == _LAYERS[model] else f"{num:g} layers at the device"
    return f"{_seconds(seconds)} at {link.mbit_per_s:g} Mbit/s with {where}"


def _why(rows: Sequence[Row]) -> str:
    """Explain what decides whether to split at all; between the two ends, a later cut only costs more."""
    told = []
    for model, num_layers in _LAYERS.items():
        mine = having(rows, {"model": model})
        sizes = " and ".join(f"{human_bytes(_mean_of(mine, 0, f'up_bytes {code}'))} in {code}" for code in _CODES)
        speeds = " and ".join(f"{_least_speed(mine, code, num_layers)} in {code}" for code in _CODES)
        pixels = human_bytes(_mean_of(mine, 0, "pixel_bytes"))
        told.append(
            f"{model}: smashed data of {sizes} at every cut, from {pixels} of pixels; a split is quicker {speeds}"
        )
    return f"What decides is whether to split at all. {'. '.join(told)}."


def _least_speed(rows: Sequence[Row], code: TensorCode, num_layers: int) -> str:
    """Return the lowest link speed at which the first cut is as fast as running everything on the device."""
    slow, fast = (_LINKS[0], _LINKS[-1])
    slow_s, fast_s = (_mean_of(rows, 0, _latency(code, link)) for link in (slow, fast))
    mbit = (slow_s - fast_s) / (1 / slow.mbit_per_s - 1 / fast.mbit_per_s)
    saved_s = _mean_of(rows, num_layers, _latency(code, fast)) - (fast_s - mbit / fast.mbit_per_s)
    return f"above {mbit / saved_s:.2g} Mbit/s" if saved_s > 0 else "over no link"


def _mean_of(rows: Sequence[Row], num: int, figure: str) -> float:
    return dict(curve_over(_AT_DEVICE, rows, figure, figure).means())[float(num)]


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    return [
        Drawing(
            title=f"Latency of {model}, smashed data in {code}",
            across=f"{_AT_DEVICE} (the last: all)",
            upward="seconds",
            curves=[
                curve_over(
                    _AT_DEVICE, having(rows, {"model": model}), _latency(code, link), f"{link.mbit_per_s:g} Mbit/s"
                )
                for link in _LINKS
            ],
            show=_seconds,
            in_percent=False,
        )
        for model, code in product(_LAYERS, _CODES)
    ]


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"


EXPERIMENT = Experiment(
    name="inference",
    title="Inference split at different cuts",
    claim=INFERENCE,
    method=(
        "One image runs through a device's head and its edge's body, at every cut of two models: the pre-trained one "
        f"({_SMALL}), and one of the shape of ViT-Base/16 with random weights. Measured on this machine: seconds of "
        "the layers on either side and of the classifier (medians), and seconds and bytes of both frames by the "
        "network's own codec. Computed from that: latency over links of "
        f"{', '.join(f'{link.mbit_per_s:g}' for link in _LINKS)} Mbit/s with a round trip of "
        f"{_seconds(_LINKS[0].round_trip_s)}, where the device is {_LINKS[0].slower:g} times slower than the edge, "
        "which is this machine. With all layers at the device nothing crosses."
    ),
    rule="agrees where the cut of least latency is not the same over all links, for both models and both codes; "
    "disagrees where it is the same for each of them; else partly.",
    data=("fashion",),
    conditions=_conditions,
    measure=_measure,
    columns={
        "device_s": Column("layers at the device", _seconds),
        "body_s": Column("layers at the edge", _seconds),
        "classifier_s": Column("classifier", _seconds),
        **{f"up_bytes {code}": Column(f"smashed, {code}", human_bytes) for code in _CODES},
        **{
            _latency(code, link): Column(f"latency, {code}, {link.mbit_per_s:g} Mbit/s", _seconds)
            for code, link in product(_CODES, _LINKS)
        },
    },
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
