"""Memory of another process. This module imports no torch, since every new process imports it again."""

import pytest

from gaisnet.errors import MeasureError
from gaisnet.research.bench.contenders.memory import peak_bytes

MIB = 2**20


def _hold(num_bytes: int) -> None:
    assert len(bytearray(b"x") * num_bytes) == num_bytes


def _fail() -> None:
    raise SystemExit(3)


def test_memory_is_that_of_the_other_process() -> None:
    mine = bytearray(b"x") * (300 * MIB)
    little, much = peak_bytes(_hold, 1), peak_bytes(_hold, 200 * MIB)
    assert 150 * MIB < much - little < 250 * MIB
    assert little < len(mine) + 200 * MIB


def test_a_process_that_fails() -> None:
    with pytest.raises(MeasureError, match="ended with code 3"):
        peak_bytes(_fail)
