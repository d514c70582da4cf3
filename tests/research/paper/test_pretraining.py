"""Pre-trained against from scratch, beside raw pixels: measured on tiny things; judged and drawn on known figures."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from gaisnet.data.images import ImageData, Images
from gaisnet.errors import NotFinite
from gaisnet.models.masked_autoencoder import MaskedSettings
from gaisnet.research.paper import experiment
from gaisnet.research.paper.classifier import accuracy, fine_tune, pretrained_classifier, random_classifier
from gaisnet.research.paper.experiment import Condition, Row, Setup
from gaisnet.research.paper.foundation import pretrained
from gaisnet.research.paper.pixels import pixel_accuracy
from gaisnet.research.paper.pretraining import EXPERIMENT

TINY = MaskedSettings(width=16, layers=2, heads=2, patch_side=14, decoder_width=8, steps=3, batch_size=16)


def bright_or_dark(count: int) -> Images:
    """Two labels that nobody can confuse."""
    labels = torch.arange(count) % 2
    grey = (labels * 200 + torch.arange(count) % 30).to(torch.uint8)
    return Images(grey[:, None, None].expand(-1, 28, 28).contiguous(), labels)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GAISNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_encoder_is_pre_trained_once_and_kept_by_what_it_was_made_of(cache: Path) -> None:
    calls: list[str] = []

    def note(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        calls.append(stage)

    images = bright_or_dark(20)
    first = pretrained(TINY, images, note)
    assert calls == ["pretrain"] * 3
    assert pretrained(TINY, images, note) == first and len(calls) == 3
    assert pretrained(TINY.model_copy(update={"seed": 1}), images) != first
    assert pretrained(TINY, bright_or_dark(21)) != first
    assert len(list(cache.iterdir())) == 3  # and nothing half-made


def test_nothing_is_left_of_a_pre_training_that_fails(cache: Path) -> None:
    def stop(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrained(TINY, bright_or_dark(20), stop)
    assert list(cache.iterdir()) == []


def test_a_classifier_learns_and_has_the_encoder_that_it_was_given() -> None:
    folder = pretrained(TINY, bright_or_dark(20))
    one, two, random = (
        make(folder, 2).state_dict()["vit.layers.0.mlp.fc1.weight"]
        for make in (pretrained_classifier, pretrained_classifier, random_classifier)
    )
    assert torch.equal(one, two) and not torch.equal(one, random)
    model = pretrained_classifier(folder, 2)
    fine_tune(model, bright_or_dark(40), steps=30, learning_rate=1e-2)
    assert accuracy(model, bright_or_dark(600)) == 1.0


def test_a_loss_that_is_not_finite_stops_it() -> None:
    model = random_classifier(pretrained(TINY, bright_or_dark(20)), 2)
    model.state_dict()["classifier.weight"].fill_(float("inf"))
    with pytest.raises(NotFinite, match="a classifier at step 0"):
        fine_tune(model, bright_or_dark(20), steps=2, learning_rate=1e-3)


def test_it_is_measured_on_few_labels_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    data = ImageData("fashion", ("dark", "bright"), bright_or_dark(60), bright_or_dark(600))
    monkeypatch.setattr(experiment, "QUICK", TINY)
    monkeypatch.setattr(Setup, "images", lambda self, name: data)
    condition: Condition = {"data": "digits", "labels per class": 10, "start": "pre-trained"}
    first, again = (EXPERIMENT.measure(condition, 0, Setup(quick=True)) for _ in range(2))
    assert first == again and first.figures["accuracy"] > 0.9


def test_raw_pixels_tell_what_nobody_can_confuse_and_no_more() -> None:
    train, test = bright_or_dark(20), bright_or_dark(50)
    half_wrong = Images(test.grey_NHW, torch.cat([test.labels_N[:25], 1 - test.labels_N[25:]]))
    for held_out, expected in ((test, 1.0), (half_wrong, 0.5)):
        assert pixel_accuracy(ImageData("fashion", ("dark", "bright"), train, held_out)) == expected


def rows(**gains: float) -> list[Row]:
    """As if pre-training added this much on a data set, a little more with every seed, and pixels gave 0.55."""
    return [
        Row(
            condition={"data": data, "labels per class": count, "start": start},
            seed=seed,
            seconds=1.0,
            figures={"accuracy": {"pre-trained": 0.5 + gain + seed / 100, "from scratch": 0.5, "pixels": 0.55}[start]},
        )
        for data, gain in gains.items()
        for count in (5, 50)
        for start in ("from scratch", "pre-trained", "pixels")
        for seed in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("fashion", "digits", "verdict"),
    [(0.1, 0.2, "agrees"), (0.1, -0.005, "partly"), (-0.005, -0.1, "disagrees")],
)
def test_the_verdict_follows_its_rule(fashion: float, digits: float, verdict: str) -> None:
    finding = EXPERIMENT.judge(rows(fashion=fashion, digits=digits))
    assert finding.verdict == verdict
    assert f"{51 + 100 * fashion:.1f} % against 50.0 % on fashion with 5 labels per class" in finding.measured


def test_pixels_are_a_yardstick_and_do_not_change_the_verdict() -> None:
    measured = EXPERIMENT.judge(rows(fashion=0.2, digits=0.01)).measured
    assert "the ViT pre-trained is above it on average in 2 of 4 conditions (by -3.0 to +16.0 points)" in measured
    assert "the ViT from scratch is above it on average in 0 of 4 conditions (by -5.0 to -5.0 points)" in measured
    assert EXPERIMENT.judge(rows(fashion=0.2, digits=0.01)).verdict == "agrees"


def test_what_is_drawn_is_what_was_measured() -> None:
    fashion, digits = EXPERIMENT.draw(rows(fashion=0.1, digits=0.2))
    assert (fashion.title, digits.title) == ("Accuracy on fashion, by labels", "Accuracy on digits, by labels")
    by_label = {curve.label: dict(curve.values) for curve in digits.curves}
    assert by_label["pre-trained"][5.0] == pytest.approx([0.7, 0.71, 0.72])
    assert by_label["from scratch"][50.0] == [0.5] * 3


def test_the_conditions_have_every_start_alike() -> None:
    for quick in (True, False):
        conditions = EXPERIMENT.conditions(quick)
        starts = [condition["start"] for condition in conditions]
        assert {starts.count(start) for start in ("pre-trained", "from scratch", "pixels")} == {len(conditions) / 3}
