"""The number of clusters: from one adapter for all devices to one each, by the smashed data that an edge sees.

Shape legend: N devices, B images, T positions, D hidden size.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import ViTModel

from gaisnet.data.images import ImageData
from gaisnet.models.encoders import cut_encoder
from gaisnet.models.families import Encoder
from gaisnet.models.parts import CutLayers
from gaisnet.models.pretrained import pretrained_model
from gaisnet.research.paper.claims import CLUSTERS, Finding, verdict_of
from gaisnet.research.paper.course import COLUMNS, measure
from gaisnet.research.paper.experiment import Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Curve, Drawing
from gaisnet.research.paper.fleet import HEAD_LAYERS, HOW, NUM_DEVICES, dealt, sites
from gaisnet.research.paper.rows import curve_over, having
from gaisnet.runs.table import percent

_ALPHAS, _NUMBERS = (0.1, 1.0), (1, 2, 4, NUM_DEVICES)
_ACROSS = "clusters"


def clusters_of(folder: Path, devices: Sequence[ImageData], number: int, seed: int) -> list[list[ImageData]]:
    """Group devices by k-means on their mean smashed activations; labels are not used."""
    from sklearn.cluster import KMeans  # an extra that only experiments on digits need

    means_ND = torch.stack([_mean_smashed(folder, data) for data in devices])
    found = KMeans(number, n_init=10, random_state=seed).fit_predict(means_ND.numpy()).tolist()
    return [[data for data, its in zip(devices, found, strict=True) if its == each] for each in sorted(set(found))]


@torch.no_grad()
def _mean_smashed(folder: Path, data: ImageData) -> Tensor:
    """Return the mean over a device's images and positions, [D]."""
    model, _ = pretrained_model(ViTModel, str(folder), str(folder), add_pooling_layer=False)
    head, _ = cut_encoder(Encoder(model.eval()), CutLayers(HEAD_LAYERS))
    hidden_BTD: Tensor = head(data.train.pixels_NCHW())
    return hidden_BTD.mean((0, 1))


def _conditions(quick: bool) -> Sequence[Condition]:
    return [{"alpha": alpha, _ACROSS: number} for alpha in _ALPHAS for number in _NUMBERS]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    devices = dealt(setup, float(condition["alpha"]), seed)
    found = clusters_of(setup.foundation(), devices, int(condition[_ACROSS]), seed)
    return measure(setup, [sites("split", mine) for mine in found], "lora", seed)


def _judge(rows: Sequence[Row]) -> Finding:
    holds, told = [], []
    for curve in _curves(rows):
        best, _ = max(curve.means()[1:-1], key=lambda place: place[1])
        seeds = dict(curve.values)
        ends = zip(seeds[best], seeds[_NUMBERS[0]], seeds[_NUMBERS[-1]], strict=True)
        holds.append(all(one > max(all_together, each_alone) for one, all_together, each_alone in ends))
        told.append(
            f"{curve.label}: " + ", ".join(f"{percent(share)} with {number:g}" for number, share in curve.means())
        )
    return Finding(verdict_of(holds), f"Accuracy by number of clusters. {'; '.join(told)}.")


def _curves(rows: Sequence[Row]) -> list[Curve]:
    return [curve_over(_ACROSS, having(rows, {"alpha": each}), "accuracy", f"alpha {each:g}") for each in _ALPHAS]


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    upward = "accuracy on held-out images"
    return [Drawing("Accuracy by number of clusters", _ACROSS, upward, _curves(rows), logarithmic=True)]


EXPERIMENT = Experiment(
    name="clusters",
    title="Number of clusters",
    claim=CLUSTERS,
    method=(
        f"{HOW} Labels are dealt with an alpha of {' and of '.join(f'{alpha:g}' for alpha in _ALPHAS)}. An edge sees "
        "no labels: it puts devices together by k-means on the mean of each one's smashed activations, in "
        f"{', '.join(map(str, _NUMBERS))} clusters. Each cluster's devices are split, learn a LoRA of their own, and "
        "are scored with it on their own held-out images, so that a device with few labels gains by one for it alone."
    ),
    rule="for each alpha: holds where the best number in between is above one cluster for all and above one for each "
    "device with every seed. Agrees where it holds for both, disagrees where for neither; else partly.",
    data=("fashion",),
    conditions=_conditions,
    measure=_measure,
    columns=COLUMNS,
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
