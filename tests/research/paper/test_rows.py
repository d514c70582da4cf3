"""Rows put beside each other."""

import pytest

from gaisnet.research.paper.experiment import Row
from gaisnet.research.paper.rows import curve_over, having, paired

ROWS = [
    Row(condition={"kind": kind, "size": size}, seed=seed, seconds=1.0, figures={"share": size * scale + seed})
    for seed in (0, 1)
    for size in (20, 3)
    for kind, scale in (("new", 2), ("old", 1))
]


def test_rows_of_a_condition() -> None:
    assert [(row.condition["size"], row.seed) for row in having(ROWS, {"kind": "old"})] == [
        *((20, 0), (3, 0), (20, 1), (3, 1))
    ]
    assert having(ROWS, {"kind": "old", "size": 4}) == []


def test_a_curve_goes_from_left_to_right_with_every_seed() -> None:
    curve = curve_over("size", having(ROWS, {"kind": "new"}), "share", "new ones")
    assert (curve.label, curve.values) == ("new ones", [(3.0, [6.0, 7.0]), (20.0, [40.0, 41.0])])


def test_pairs_differ_in_one_thing_and_have_the_same_seed() -> None:
    assert paired(ROWS, "kind", "new", "old", "share") == [
        ({"size": 20}, [(40.0, 20.0), (41.0, 21.0)]),
        ({"size": 3}, [(6.0, 3.0), (7.0, 4.0)]),
    ]
    with pytest.raises(KeyError):
        paired(ROWS[:1], "kind", "new", "old", "share")
