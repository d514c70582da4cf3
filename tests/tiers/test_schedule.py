"""Training schedules: batches, whole passes or parts of one, the same at every site and after a restart."""

from collections.abc import Sequence
from typing import Any

import pytest

from gaisnet.config.learning import FineTuneSettings
from gaisnet.tiers.split.schedule import Step, TrainingSchedule
from tests.tiers.cohort import cohort_config

LENGTHS = [5, 9, 3, 7, 7, 2, 8, 4, 6, 3, 5]


def steps_of(
    edge_round: int, cycle: int = 0, name: str = "north", sequences: int = 6, **changes: Any
) -> list[list[Step]]:
    config = cohort_config(
        (1,), fine_tune={"batch_size": 2, "anchor_weight": 1.0, "anchor_every": 2, "edge_rounds": 24, **changes}
    )
    return TrainingSchedule.for_edge_round(config, "edge", name, cycle, edge_round).plan_passes(LENGTHS, sequences)


def flat(passes: Sequence[Sequence[Step]]) -> list[Step]:
    return [step for steps in passes for step in steps]


def test_a_round_of_whole_passes_has_every_example_in_each() -> None:
    passes = steps_of(0, local_epochs=3)
    assert [step.number for step in flat(passes)] == list(range(18))
    for steps in passes:
        assert sorted(i for step in steps for i in step.examples) == list(range(11))
    assert passes[0] != passes[1] and steps_of(1, local_epochs=3) != passes


@pytest.mark.parametrize("parts", [2, 3, 4, 6, 8])
def test_rounds_that_share_a_pass_do_the_steps_of_the_whole(parts: int) -> None:
    whole = flat(steps_of(0, local_epochs=1))
    rounds = [flat(steps_of(n, local_epochs=1 / parts)) for n in range(parts)]
    assert [step for steps in rounds for step in steps] == whole
    assert max(map(len, rounds)) - min(map(len, rounds)) <= 1
    following = [flat(steps_of(parts + n, local_epochs=1 / parts)) for n in range(parts)]
    assert [step for steps in following for step in steps] == flat(steps_of(1, local_epochs=1)) != whole


def test_text_pulls_in_one_step_of_so_many_in_parts_too() -> None:
    pulled = [step.anchor_sequences for n in range(6) for step in flat(steps_of(n, local_epochs=1 / 6))]
    assert [bool(chosen) for chosen in pulled] == [False, True] * 3
    assert all(0 <= i < 6 for chosen in pulled for i in chosen)
    assert all(len(chosen) == FineTuneSettings().anchor_batch_size for chosen in pulled[1::2])


@pytest.mark.parametrize("changes", [{"sequences": 0}, {"anchor_weight": 0.0}])
def test_nothing_pulls_without_text_or_weight(changes: dict[str, Any]) -> None:
    without = flat(steps_of(0, local_epochs=2, **changes))
    assert not any(step.anchor_sequences for step in without)
    assert [step.examples for step in without] == [step.examples for step in flat(steps_of(0, local_epochs=2))]


def test_the_rate_falls_in_the_last_share_of_a_cycle() -> None:
    assert {step.learning_rate for step in flat(steps_of(0, local_epochs=2, learning_rate=0.25))} == {0.25}
    changes: dict[str, Any] = {"local_epochs": 0.5, "edge_rounds": 4, "cooldown": 0.5, "learning_rate": 1.0}
    rates = [step.learning_rate for n in range(4) for step in flat(steps_of(n, **changes))]
    assert rates[:6] == [1.0] * 6 and rates[6:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    whole = [step.learning_rate for step in flat(steps_of(0, **changes | {"local_epochs": 2, "edge_rounds": 1}))]
    assert whole == pytest.approx(rates)


def test_every_party_and_cycle_has_an_order_of_its_own() -> None:
    assert steps_of(0) == steps_of(0)
    orders = [steps_of(0), steps_of(0, cycle=1), steps_of(0, name="south"), steps_of(1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
