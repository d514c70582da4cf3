"""A figure over several rounds."""

import pytest

from gaisnet.research.bench.spread import Spread


def test_one_slow_round_does_not_move_the_median() -> None:
    spread = Spread.summarize([1.0, 100.0, 2.0])
    assert (spread.median, spread.min, spread.max, spread.rounds) == (2.0, 1.0, 100.0, 3)
    assert str(spread) == "2.00 (1.00 to 100.00)"


def test_of_nothing() -> None:
    with pytest.raises(ValueError, match="no values"):
        Spread.summarize([])
