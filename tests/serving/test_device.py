"""What 'auto' escalates to, and the examples that its threshold comes from."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from gaisnet.config import RoutingSettings
from gaisnet.serving.generation.calibration import CalibrationExample, read_calibrations
from gaisnet.serving.generation.decoding import generate
from gaisnet.serving.generation.device import AnsweringDevice, ServedDomain, calibrated, uncalibrated
from gaisnet.serving.generation.routing import DEFAULT_MEASURE, Target
from gaisnet.serving.generation.text import Sampling
from tests.serving.models import prompt
from tests.serving.servers import LocalBodies, chat_tokenizer, shared_bodies

MERGED, OWN = ("merged",), ("shapes",)


def held_out(seed: int, num: int) -> list[CalibrationExample]:
    return [CalibrationExample(tuple(prompt(7, seed=seed + i)), (5, 6, 257)) for i in range(num)]


def tiny_device(
    examples: Mapping[str, list[CalibrationExample]], merged: bool = True
) -> tuple[AnsweringDevice, LocalBodies]:
    parts, bodies = shared_bodies()
    domains = {name: ServedDomain(("relay", "domain"), (name,), examples.get(name, ())) for name in bodies.edges}
    return AnsweringDevice("shapes", parts, chat_tokenizer(), bodies, domains, merged), bodies


BOTH = {"shapes": held_out(0, 8), "tastes": held_out(100, 8)}


@pytest.mark.parametrize(
    ("escalate_to", "merged", "adapters"),
    [("merged", True, MERGED), ("merged", False, OWN), ("domain", True, OWN)],
    ids=["all domains", "there is one domain only", "as is wanted"],
)
def test_what_it_escalates_to(escalate_to: str, merged: bool, adapters: tuple[str, ...]) -> None:
    settings = RoutingSettings.model_validate({"escalate_to": escalate_to, "other_domains": 0.5, "escalate": "always"})
    device, bodies = tiny_device({"shapes": BOTH["shapes"][:1], "tastes": BOTH["tastes"][:1]}, merged)
    assert device.routing("shapes", settings, {}).adapters == adapters
    found = device.calibration("shapes", settings)
    assert (found.adapters, found.num_trials, found.num_others) == (adapters, 2, 1)
    # Own examples and others': all are asked of the domain's DM, and of the FM with what it escalates to.
    asked = [Target("edge", ("relay", "domain"), "shapes"), Target("cloud", adapters, "shapes")]
    assert sorted(bodies.opened, key=str) == sorted(asked * 2, key=str)


@pytest.mark.parametrize(("share", "num"), [(0.0, 0), (0.2, 2), (0.5, 8)])
def test_a_share_of_the_requests_is_of_other_domains(share: float, num: int) -> None:
    settings = RoutingSettings(other_domains=share)
    device, _ = tiny_device(BOTH)
    others = device.others("shapes", settings)
    assert len(others) == num
    assert len({each.prompt for each in others}) == num
    assert set(others) <= set(BOTH["tastes"])
    assert others == tiny_device(BOTH)[0].others("shapes", settings)
    assert set(device.others("tastes", settings)) <= set(BOTH["shapes"])


def test_a_device_that_has_only_its_own_examples_goes_by_those() -> None:
    few, _ = tiny_device({**BOTH, "tastes": BOTH["tastes"][:3]})
    assert len(few.others("shapes", RoutingSettings(other_domains=0.5))) == 3
    alone, _ = tiny_device({"shapes": BOTH["shapes"]})
    own, others = alone.trials("shapes", RoutingSettings(), DEFAULT_MEASURE)
    assert (len(own), others) == (8, [])


def test_a_question_of_another_domain_is_what_the_threshold_comes_from() -> None:
    """The DM does as well as the FM on its own domain; only the other's examples are worth an escalation."""
    parts, bodies = shared_bodies()

    def answered(target: Target, seed: int) -> CalibrationExample:
        asked = tuple(prompt(7, seed=seed))
        session = bodies.open_session(target, parts.first, parts.stop, 0)
        return CalibrationExample(asked, tuple(generate(parts, session, asked, Sampling(max_tokens=1))))

    dm, fm = Target("edge", ("relay", "domain"), "shapes"), Target("cloud", MERGED, "shapes")
    own, others = [answered(dm, 0), answered(fm, 1)], [answered(fm, 100), answered(fm, 101)]
    device, _ = tiny_device({"shapes": own, "tastes": others})
    wide = {"most_escalated": 1.0}
    alone = device.calibration("shapes", RoutingSettings(other_domains=0.0, **wide))
    assert (alone.domain_accuracy, alone.foundation_accuracy, alone.escalated) == (0.5, 0.5, 0.0)
    mixed = device.calibration("shapes", RoutingSettings(other_domains=0.5, **wide))
    assert (mixed.domain_accuracy, mixed.foundation_accuracy, mixed.num_others) == (0.25, 0.75, 2)
    assert mixed.gain_kept == 1.0
    assert mixed.escalated >= 0.5
    assert mixed.threshold > alone.threshold


@pytest.mark.parametrize(
    "changes",
    [
        {"escalate_to": "domain"},
        {"other_domains": 0.0},
        {"most_escalated": 0.1},
    ],
)
def test_a_threshold_for_something_else_is_not_taken(changes: dict[str, object], tmp_path: Path) -> None:
    device, _ = tiny_device({"shapes": BOTH["shapes"][:4], "tastes": BOTH["tastes"][:4]})
    settings = RoutingSettings(other_domains=0.2)
    known = calibrated(device, settings, tmp_path)
    assert set(known) == {"shapes", "tastes"}
    assert uncalibrated(device, settings, tmp_path) == []
    assert device.routing("shapes", settings, known).policy == "auto"
    other = RoutingSettings.model_validate({**settings.model_dump(), **changes})
    assert device.routing("shapes", other, known).policy == "never"
    assert uncalibrated(device, other, tmp_path) == ["shapes", "tastes"]
    again = calibrated(device, other, tmp_path)
    assert read_calibrations(tmp_path) == again != known
    assert uncalibrated(device, other, tmp_path) == []
