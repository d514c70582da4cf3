"""A run's answers, measured: every figure is there, is what it says, and the run is as it was."""

import hashlib
import json
from pathlib import Path

import pytest

from gaisnet.config import RoutingSettings
from gaisnet.config.file import load_config
from gaisnet.research.bench.escalation import auto_figures
from gaisnet.research.bench.rounds import Effort
from gaisnet.research.bench.serving import measure_serving, write_figures
from gaisnet.runs.run import run_experiment
from gaisnet.serving.generation.calibration import Trial
from tests.tiny import tiny_edge, write_tiny_run


def contents(folder: Path) -> dict[str, str]:
    """A run without what says who has it open, or only draws it."""
    files = (p for name in ("checkpoint", "adapters") for p in (folder / name).rglob("*") if p.is_file())
    every = [*files, folder / "summary.json"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in every}


@pytest.mark.integration
def test_a_run_is_measured_and_left_alone(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, edges=[tiny_edge("north", "shapes"), tiny_edge("south", "tastes")], cycles=1)
    run_experiment(load_config(tmp_path / "run.yaml"), tmp_path / "out")
    before = contents(tmp_path / "out")
    effort = Effort(rounds=2, prompts=2, tokens=6, at_once=3, beside=2, seconds=1.0)
    told: dict[str, tuple[int, int]] = {}
    figures = measure_serving(
        tmp_path / "out", effort, lambda stage, done, total, _: told.update({stage: (done, total)})
    )
    write_figures(figures, tmp_path / "serving.json")
    assert contents(tmp_path / "out") == before
    assert figures.same.model_dump() == {"num_answers": 4, "edge": 4, "cloud": 4, "speculative": 4}
    written = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert written["schema"] == "gaisnet.serving/2"
    for spread in written["ratios"].values():
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert spread["rounds"] == 2
    assert 1 <= written["ratios"]["tokens_per_cloud_call"]["min"] <= 6
    assert set(written["auto"]) == {"shapes", "shapes+others", "tastes", "tastes+others"}
    assert told["calibrate"] == (11, 11)  # 9 of the domain's own and 2 others, each tried once for both figures
    benches = {stage: told[stage] for stage in told if stage.startswith("bench_")}
    assert set(benches.values()) == {(2, 2)}
    assert len(benches) == 6


def trial(confidence: float, domain: bool, foundation: bool) -> Trial:
    return Trial((confidence,), None if domain else 0, foundation)


def test_a_threshold_is_judged_where_it_was_not_chosen() -> None:
    # Where it was chosen the DM is wrong below 0.5; where it is judged, twice of four times below 0.9.
    known = [trial(0.4, False, True), *[trial(0.6, True, True)] * 9]
    judged = [trial(0.4, False, True), trial(0.8, False, True), trial(0.95, True, True), trial(0.4, True, False)]
    figures = auto_figures([(known, judged)], RoutingSettings())
    assert figures.domain_accuracy.median == 0.5
    assert figures.foundation_accuracy.median == 0.75
    assert figures.escalated.median == 0.5  # the two at 0.4, one for the better and one for the worse
    assert figures.accuracy.median == 0.5
    assert figures.gain_kept is not None
    assert figures.gain_kept.median == 0.0


def test_without_a_gain_there_is_no_share_of_it() -> None:
    trials = [trial(0.4, True, True)] * 4
    figures = auto_figures([(trials, trials)] * 2, RoutingSettings())
    assert (figures.gain_kept, figures.escalated.max) == (None, 0.0)
