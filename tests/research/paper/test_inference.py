"""Split inference: parts and frames of a tiny ViT; latency, verdict and pictures from figures that are known."""

from pathlib import Path

import pytest
from transformers import ViTForImageClassification

from gaisnet.data.images import ImageData
from gaisnet.errors import CutError
from gaisnet.research.paper import experiment
from gaisnet.research.paper.experiment import Row, Setup
from gaisnet.research.paper.inference import EXPERIMENT
from gaisnet.research.paper.latency import Cut, Link
from tests.research.paper.test_pretraining import TINY, bright_or_dark
from tests.tiny import NUM_LAYERS, tiny_encoder, tiny_inputs


def tiny_cut(num_layers: int) -> Cut:
    model = tiny_encoder("vit")
    assert isinstance(model, ViTForImageClassification)
    return Cut.after(model, num_layers, tiny_inputs("vit", 1), repeats=2)


def test_latency_by_hand() -> None:
    link = Link(mbit_per_s=2, round_trip_s=0.01, slower=4)
    assert link.seconds(0.5, 0.25, 1_000_000) == pytest.approx(4 * 0.5 + 0.01 + 4.0 + 0.25)
    assert link.seconds(0.5, 0.0, 0) == 2.0


def test_the_parts_are_the_model_and_each_takes_its_time() -> None:
    cut = tiny_cut(2)
    assert all(0 < seconds < 1 for seconds in cut.compute())
    assert cut.head.stack.indices == [0, 1] and cut.body.indices == list(range(2, NUM_LAYERS))
    with pytest.raises(CutError):
        tiny_cut(NUM_LAYERS)


def test_frames_are_those_of_the_network_and_as_large_at_every_cut() -> None:
    exact, few_bits = (tiny_cut(1).crossing(code) for code in ("float32", "int4"))
    rows = 7 * 32  # [CLS] and six patches
    assert rows * 4 < exact.up_bytes < rows * 4 + 600
    assert rows / 2 < few_bits.up_bytes < exact.up_bytes
    assert few_bits.up_bytes == tiny_cut(3).crossing("int4").up_bytes
    assert 0 < exact.at_device_s < 1 and 0 < exact.at_edge_s < 1


def test_a_cut_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GAISNET_CACHE", str(tmp_path))
    monkeypatch.setattr(experiment, "QUICK", TINY.model_copy(update={"layers": 6}))
    data = ImageData("fashion", ("dark", "bright"), bright_or_dark(20), bright_or_dark(20))
    monkeypatch.setattr(Setup, "images", lambda self, name: data)
    split, whole = (
        EXPERIMENT.measure({"model": "small ViT", "layers at the device": num}, 0, Setup(quick=True)).figures
        for num in (1, 6)
    )
    assert split.keys() == whole.keys() >= EXPERIMENT.columns.keys()
    assert (whole["body_s"], whole["up_bytes int4"], whole["pixel_bytes"]) == (0.0, 0.0, 784)
    assert whole["latency_s float32 1"] == whole["latency_s int4 100"] == 4 * whole["device_s"]
    at_least = 0.01 + 8e-6 * split["up_bytes float32"] + 4 * split["device_s"] + split["body_s"]
    assert at_least < split["latency_s float32 1"] < at_least + 0.1


def rows(all_at_device_s: float) -> list[Row]:
    """An edge takes 0.1 s for a layer, a device 0.4; what crosses is 1 Mbit at every cut, or 0.1 in few bits."""
    found = []
    for condition, seed in EXPERIMENT.units(quick=False).values():
        num, num_layers = int(condition["layers at the device"]), 6 if condition["model"] == "small ViT" else 12
        whole = num == num_layers
        figures = {"device_s": 0.0, "body_s": 0.0, "classifier_s": 0.0, "pixel_bytes": 784.0}
        for code, mbit in (("float32", 1.0), ("int4", 0.1)):
            figures[f"up_bytes {code}"] = mbit * 125_000
            for speed in (1, 10, 100):
                split_s = 0.4 * num + 0.1 * (num_layers - num) + mbit / speed
                figures[f"latency_s {code} {speed}"] = all_at_device_s if whole else split_s
        found.append(Row(condition=condition, seed=seed, seconds=1.0, figures=figures))
    return found


@pytest.mark.parametrize(("all_at_device_s", "verdict"), [(9.0, "disagrees"), (0.1, "disagrees"), (1.35, "partly")])
def test_the_verdict_follows_its_rule(all_at_device_s: float, verdict: str) -> None:
    assert EXPERIMENT.judge(rows(all_at_device_s)).verdict == verdict


def test_the_least_speed_is_that_at_which_a_split_is_as_quick() -> None:
    measured = EXPERIMENT.judge(rows(1.35)).measured
    # 0.6 s at the edge and 1 Mbit: as quick as 1.35 s where the link takes 0.75 s. ViT-Base's edge takes 1.2 s.
    assert "quicker above 0.13 Mbit/s in int4 and above 1.3 Mbit/s in float32" in measured
    assert "quicker above 0.67 Mbit/s in int4 and above 6.7 Mbit/s in float32" in measured
    assert "small ViT in float32: 1.35 s at 1 Mbit/s with all at the device; 700 ms at 10 Mbit/s with 0" in measured
    assert "quicker over no link in int4" in EXPERIMENT.judge(rows(0.1)).measured


def test_what_is_drawn_is_what_was_measured() -> None:
    drawings = EXPERIMENT.draw(rows(9.0))
    assert len({drawing.title for drawing in drawings}) == 4
    base = next(drawing for drawing in drawings if drawing.title == "Latency of ViT-Base, smashed data in float32")
    by_label = {curve.label: dict(curve.means()) for curve in base.curves}
    assert by_label["1 Mbit/s"][3.0] == pytest.approx(0.4 * 3 + 0.1 * 9 + 1)
    assert by_label["100 Mbit/s"][12.0] == pytest.approx(9.0)
