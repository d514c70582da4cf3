"""From who was right, and how sure the domain model was, to a threshold."""

import json
import random
from pathlib import Path

import pytest

from gaisnet.config import RoutingSettings
from gaisnet.errors import CheckpointError
from gaisnet.serving.generation.calibration import (
    FILE_NAME,
    Calibration,
    CalibrationExample,
    Trial,
    calibrate,
    collect,
    read_calibrations,
    write_calibrations,
)
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.routing import Target, top_probability
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import prompt
from tests.serving.servers import shared_bodies

SETTINGS = RoutingSettings()


def one(confidence: float, domain_right: bool, foundation_right: bool) -> Trial:
    return Trial((confidence,), None if domain_right else 0, foundation_right)


# Of ten answers the DM has four and the FM eight: it mends five and spoils one.
TEN = [
    *(one(0.10, False, True), one(0.15, False, True), one(0.20, False, False), one(0.30, False, True)),
    *(one(0.40, True, True), one(0.50, False, True), one(0.60, True, False), one(0.70, False, True)),
    *(one(0.80, True, True), one(0.90, True, True)),
]


def test_by_hand() -> None:
    found = calibrate(TEN, RoutingSettings(most_escalated=0.5), "top")
    assert found == Calibration(
        measure="top",
        threshold=(0.40 + 0.50) / 2,  # below it three of the four that are gained, as already below 0.35
        adapters=(),
        num_trials=10,
        num_others=0,
        most_escalated=0.5,
        domain_accuracy=0.4,
        foundation_accuracy=0.8,
        accuracy=0.7,
        escalated=0.5,
    )
    assert found.gain_kept == pytest.approx(0.75)


def test_of_several_that_are_right_as_often_the_one_in_the_middle_is_taken() -> None:
    found = calibrate(TEN, RoutingSettings(most_escalated=1.0), "top")  # 0.55, 0.75, 0.85 and above 0.9
    assert found.threshold == pytest.approx(0.85)
    assert (found.accuracy, found.escalated) == (0.8, 0.9)


def test_the_limit_of_escalations_holds() -> None:
    found = calibrate(TEN, RoutingSettings(most_escalated=0.3), "top")
    assert (found.threshold, found.accuracy, found.escalated) == ((0.20 + 0.30) / 2, 0.6, 0.3)


@pytest.mark.parametrize("trials", [[], [one(0.1, True, True)], [one(0.1, True, False), one(0.2, False, False)]])
def test_a_foundation_model_that_does_no_better_is_never_asked(trials: list[Trial]) -> None:
    found = calibrate(trials, SETTINGS, "top")
    assert found.escalated == 0
    assert found.gain_kept is None
    assert not any(trial.escalated(found.threshold) for trial in trials)


def test_it_equals_a_search_through_all_thresholds() -> None:
    rng = random.Random(5)
    for _ in range(60):
        trials = [
            Trial(tuple(rng.random() for _ in range(length)), rng.choice([None, *range(length)]), rng.random() < 0.7)
            for length in (rng.randint(1, 3) for _ in range(rng.randint(1, 12)))
        ]
        found = calibrate(trials, SETTINGS, "top")
        alone, always = sum(t.wrong_at is None for t in trials), sum(t.foundation_right for t in trials)
        curve = [
            (sum(t.escalated(threshold) for t in trials), sum(t.right(threshold) for t in trials))
            for threshold in [-1.0, *(c + 1e-9 for t in trials for c in t.confidences)]
        ]
        allowed = [point for point in curve if point[0] <= 0.3 * len(trials)]
        if always > alone:
            assert found.accuracy == max(right for _, right in allowed) / len(trials)
            point = round(found.escalated * len(trials)), round(found.accuracy * len(trials))
            assert point in allowed


@pytest.mark.parametrize(
    ("threshold", "right"),
    [(0.1, False), (0.4, False), (0.6, True), (0.95, True)],
    ids=["not asked", "asked when it is too late", "asked at the wrong token", "asked before"],
)
def test_the_foundation_model_mends_what_is_not_written_yet(threshold: float, right: bool) -> None:
    trial = Trial((0.9, 0.5, 0.3), wrong_at=1, foundation_right=True)
    assert trial.right(threshold) == right
    assert trial.escalated(threshold) == (threshold > 0.3)


def test_trials_of_real_bodies() -> None:
    parts, bodies = shared_bodies()
    dm, fm = Target("edge", ("relay", "domain"), "shapes"), Target("cloud", ("shapes",), "shapes")
    answers = {
        target: tuple(
            generate(parts, bodies.open_session(target, parts.first, parts.stop, 0), prompt(7), Sampling(max_tokens=5))
        )
        for target in (dm, fm)
    }
    assert answers[dm] != answers[fm]

    def trial(answer: tuple[int, ...]) -> Trial:
        return collect(parts, bodies, dm, ("shapes",), CalibrationExample(tuple(prompt(7)), answer), "top_probability")

    as_domain, as_foundation = trial(answers[dm]), trial(answers[fm])
    assert (as_domain.wrong_at, as_domain.foundation_right, len(as_domain.confidences)) == (None, False, 5)
    differs = next(i for i, (a, b) in enumerate(zip(answers[dm], answers[fm], strict=True)) if a != b)
    assert (as_foundation.wrong_at, as_foundation.foundation_right) == (differs, True)
    assert bodies.num_sessions == 0
    assert all(0 < confidence <= 1 for confidence in as_domain.confidences)
    assert top_probability.__name__ == "top_probability"


def test_an_answer_may_end_with_any_token_that_ends_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, bodies = shared_bodies()
    dm = Target("edge", ("relay", "domain"), "shapes")
    session = bodies.open_session(dm, parts.first, parts.stop, 0)
    written = tuple(generate(parts, session, prompt(7), Sampling(max_tokens=4)))
    answer = CalibrationExample(tuple(prompt(7)), (*written[:3], 257))
    assert collect(parts, bodies, dm, ("shapes",), answer, "margin").wrong_at == 3
    monkeypatch.setattr(parts.head.stack.config, "eos_token_id", [257, written[3]])
    assert collect(parts, bodies, dm, ("shapes",), answer, "margin").wrong_at is None


def test_a_file_of_them(tmp_path: Path) -> None:
    assert read_calibrations(tmp_path) == {}
    kept = {"shapes": calibrate(TEN, SETTINGS, "top", ("merged",), 2), "tastes": calibrate([], SETTINGS, "top")}
    write_calibrations(tmp_path, kept)
    assert read_calibrations(tmp_path) == kept
    before = {"schema": "gaisnet.calibration/1", "domains": {"shapes": {"threshold": 0.5}}}
    (tmp_path / FILE_NAME).write_text(json.dumps(before), encoding="utf-8")
    assert read_calibrations(tmp_path) == {}  # what it is of is not known: it is found anew
    (tmp_path / FILE_NAME).write_text('{"schema": "gaisnet.calibration/9", "domains": {}}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="calibration.json"):
        read_calibrations(tmp_path)
