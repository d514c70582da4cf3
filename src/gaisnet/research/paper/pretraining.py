"""Pre-trained against from scratch: the same ViT, labels and steps; raw pixels as a second baseline."""

from collections.abc import Sequence

import torch

from gaisnet.data.images import ImageData, sample_images
from gaisnet.research.paper.claims import PRETRAINING, Finding, verdict_of
from gaisnet.research.paper.classifier import accuracy, fine_tune, pretrained_classifier, random_classifier
from gaisnet.research.paper.experiment import Column, Condition, Experiment, Measured, Row, Setup
from gaisnet.research.paper.figures import Drawing, mean
from gaisnet.research.paper.pixels import pixel_accuracy
from gaisnet.research.paper.rows import curve_over, having, paired
from gaisnet.runs.table import percent

_DATA = ("fashion", "digits")
_PRETRAINED, _SCRATCH, _PIXELS = _STARTS = ("pre-trained", "from scratch", "pixels")
_NUM_TEST, _LEARNING_RATE = 500, 1e-3  # digits have a test set of 599


def _conditions(quick: bool) -> Sequence[Condition]:
    per_class = (10,) if quick else (5, 10, 50)
    return [
        {"data": data, "labels per class": count, "start": start}
        for data in _DATA
        for count in per_class
        for start in _STARTS
    ]


def _measure(condition: Condition, seed: int, setup: Setup) -> Measured:
    start, count = condition["start"], int(condition["labels per class"])
    data = sample_images(setup.images(str(condition["data"])), count, _NUM_TEST, seed)
    found = pixel_accuracy(data) if start == _PIXELS else _vit_accuracy(start == _PRETRAINED, data, count, seed, setup)
    return Measured(figures={"accuracy": found})


def _vit_accuracy(is_pretrained: bool, data: ImageData, per_class: int, seed: int, setup: Setup) -> float:
    make = pretrained_classifier if is_pretrained else random_classifier
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make(setup.foundation(), len(data.labels))
        fine_tune(model, data.train, _steps(per_class, setup.quick), _LEARNING_RATE)
    return accuracy(model, data.test)


def _steps(per_class: int, quick: bool) -> int:
    """Return enough steps for both starts to fit the training set completely; the same for both."""
    return 60 if quick else 100 + 4 * per_class


def _judge(rows: Sequence[Row]) -> Finding:
    found = paired(rows, "start", _PRETRAINED, _SCRATCH, "accuracy")
    told = [
        f"{percent(mean([one for one, _ in pairs]))} against {percent(mean([other for _, other in pairs]))} "
        f"on {condition['data']} with {condition['labels per class']} labels per class"
        for condition, pairs in found
    ]
    holds = [all(one > other for one, other in pairs) for _, pairs in found]
    return Finding(verdict_of(holds), f"Pre-trained against from scratch: {', '.join(told)}. {_beside_pixels(rows)}")


def _beside_pixels(rows: Sequence[Row]) -> str:
    """Count how often the two are better than a model that knows nothing of images."""
    told = []
    for start in (_PRETRAINED, _SCRATCH):
        found = [pairs for _, pairs in paired(rows, "start", start, _PIXELS, "accuracy")]
        gains = [mean([one - other for one, other in pairs]) for pairs in found]
        told.append(
            f"the ViT {start} is above it on average in {sum(gain > 0 for gain in gains)} of {len(gains)} "
            f"conditions (by {100 * min(gains):+.1f} to {100 * max(gains):+.1f} points)"
        )
    return (
        f"Logistic regression on raw pixels is a yardstick outside of the claim: {', '.join(told)}. Where the "
        "pre-trained ViT is not above it, so small a foundation model does not pay for itself by accuracy."
    )


def _draw(rows: Sequence[Row]) -> Sequence[Drawing]:
    return [
        Drawing(
            title=f"Accuracy on {data}, by labels",
            across="labels per class",
            upward="accuracy on held-out images",
            curves=[
                curve_over("labels per class", having(rows, {"data": data, "start": start}), "accuracy", start)
                for start in _STARTS
            ],
            logarithmic=True,
        )
        for data in _DATA
    ]


EXPERIMENT = Experiment(
    name="pretraining",
    title="Pre-trained against from scratch",
    claim=PRETRAINING,
    method=(
        "A small ViT is pre-trained on the 60,000 images of Fashion-MNIST by masked autoencoding (arXiv 2111.06377), "
        "which looks at no label. It and a ViT of the same shape with random weights are then fine-tuned, all weights, "
        "on the same few labelled images with the same steps: of Fashion-MNIST, and of scikit-learn's digits, which "
        "pre-training never saw. Logistic regression on the raw pixels of the same images, without any network, stands "
        "beside both."
    ),
    rule="agrees where pre-training gives the higher accuracy with every seed, on both data sets, for every number of "
    "labels; disagrees where that is so for none of them; else partly.",
    data=_DATA,
    conditions=_conditions,
    measure=_measure,
    columns={"accuracy": Column("accuracy", percent)},
    judge=_judge,
    draw=_draw,
)
"""The experiment."""
