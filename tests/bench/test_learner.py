"""Learning that is held up and goes on."""

import threading
import time
from typing import Any

import pytest

from gaisnet.bench.learner import Learner


class Rounds:
    """A network whose rounds have ten steps."""

    def __init__(self, learner: Learner, fail_at: int | None = None) -> None:
        self.cycle = 0
        self.fail_at = fail_at
        self._learner = learner

    def fine_tune(self) -> None:
        for step in range(10):
            if self.cycle == self.fail_at:
                raise RuntimeError("it broke")
            time.sleep(0.001)
            self._learner("fine_tune", step, 10, {"loss": 1.0})


def test_it_learns_inside_and_only_there() -> None:
    told: list[str] = []
    learner = Learner(lambda stage, *_: told.append(stage))
    network: Any = Rounds(learner)
    with learner.learning(network):
        with learner.runs() as speed:
            time.sleep(0.2)
        assert speed.steps_per_s > 0
        time.sleep(0.05)  # the step that was under way
        held = network.cycle
        time.sleep(0.1)
        assert network.cycle == held > 0
    assert not [t for t in threading.enumerate() if t.name == "learning"]
    learner("calibrate", 0, 1, {})
    assert told == ["calibrate"]


def test_what_it_fails_with_is_told() -> None:
    learner = Learner(lambda *_: None)
    network: Any = Rounds(learner, fail_at=0)
    with pytest.raises(RuntimeError, match="it broke"), learner.learning(network):
        pass
