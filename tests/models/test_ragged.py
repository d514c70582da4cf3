"""Sequences of different lengths as one block, and the batches that are cut out of it."""

import pytest
import torch
from torch import Tensor

from gaisnet.models.ragged import Ragged, by_length, join, relative_square, shuffled_batches

pytestmark = pytest.mark.numeric


def counted(*lengths: int) -> Ragged:
    """Rows that tell sequence and position: row t of sequence i is [i, t]."""
    rows = [[float(i), float(t)] for i, length in enumerate(lengths) for t in range(length)]
    return Ragged(torch.tensor(rows), lengths)


def random_lengths(num: int, seed: int = 0) -> list[int]:
    return torch.randint(1, 60, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def batches(lengths: list[int], batch_size: int, seed: int = 0) -> list[list[int]]:
    return list(shuffled_batches(lengths, batch_size, torch.Generator().manual_seed(seed)))


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_sequences_are_views_of_their_rows() -> None:
    block = counted(2, 1, 3)
    assert len(block) == 3
    assert [s.tolist() for s in block.sequences()] == [[[0, 0], [0, 1]], [[1, 0]], [[2, 0], [2, 1], [2, 2]]]
    block.sequences()[1].fill_(9.0)
    assert block.rows_ND[2].tolist() == [9.0, 9.0]


def test_some_sequences_padded_in_the_order_asked_for() -> None:
    padded_BTD = counted(2, 1, 3).padded([2, 0])
    assert padded_BTD.tolist() == [[[2, 0], [2, 1], [2, 2]], [[0, 0], [0, 1], [0, 0]]]


def test_blocks_joined() -> None:
    joined = join([counted(2, 1), counted(3)])
    assert joined.lengths == (2, 1, 3)
    assert joined.rows_ND.tolist() == [[0, 0], [0, 1], [1, 0], [0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("batch_size", [1, 2, 7, 100])
def test_a_causal_function_gives_what_it_gives_to_each_sequence_alone(batch_size: int) -> None:
    lengths = random_lengths(23)
    block = Ragged(torch.randn(sum(lengths), 3), tuple(lengths))

    def causal(hidden_BTD: Tensor) -> Tensor:
        return torch.cat([hidden_BTD.cumsum(dim=1), hidden_BTD[..., :1]], dim=-1)

    mapped = block.map_batches(causal, batch_size)
    assert mapped.lengths == block.lengths and mapped.rows_ND.shape == (sum(lengths), 4)
    for found, alone in zip(mapped.sequences(), block.sequences(), strict=True):
        torch.testing.assert_close(found, causal(alone[None])[0])


def test_mapping_passes_batches_of_like_lengths_and_keeps_no_gradients_or_padding() -> None:
    shapes = []

    def note(hidden_BTD: Tensor) -> Tensor:
        shapes.append(tuple(hidden_BTD.shape[:2]))
        return hidden_BTD

    block = counted(5, 1, 4, 2, 3)
    block.rows_ND.requires_grad_()
    mapped = block.map_batches(note, 2)
    assert shapes == [(2, 2), (2, 4), (1, 5)]
    assert not mapped.rows_ND.requires_grad and mapped.rows_ND.tolist() == block.rows_ND.tolist()


# -- batches -----------------------------------------------------------------------------------------------------------


def test_by_length_by_hand() -> None:
    assert by_length([5, 1, 4, 1, 3], 2) == [[1, 3], [4, 2], [0]]
    assert by_length([], 4) == []


@pytest.mark.parametrize("num", [1, 15, 16, 17, 300])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_an_epoch_has_every_sequence_once_in_full_batches(num: int, batch_size: int) -> None:
    epoch = batches(random_lengths(num), batch_size)
    assert sorted(i for batch in epoch for i in batch) == list(range(num))
    assert all(1 <= len(batch) <= batch_size for batch in epoch)
    assert len(epoch) == -(-num // batch_size)


def test_a_generator_gives_the_same_epochs_and_each_epoch_is_another() -> None:
    lengths = random_lengths(50)
    assert batches(lengths, 4, seed=1) == batches(lengths, 4, seed=1)
    assert batches(lengths, 4, seed=1) != batches(lengths, 4, seed=2)
    generator = torch.Generator().manual_seed(1)
    assert list(shuffled_batches(lengths, 4, generator)) != list(shuffled_batches(lengths, 4, generator))


def test_a_batch_has_like_lengths_so_that_little_is_padded() -> None:
    lengths = random_lengths(512)

    def padding(epoch: list[list[int]]) -> int:
        return sum(max(lengths[i] for i in batch) - lengths[j] for batch in epoch for j in batch)

    order = torch.randperm(512, generator=torch.Generator().manual_seed(0)).tolist()
    plain = [order[at : at + 16] for at in range(0, 512, 16)]
    assert padding(batches(lengths, 16)) < 0.3 * padding(plain)


def test_batches_do_not_come_shortest_first() -> None:
    lengths = random_lengths(512)
    firsts = [lengths[batch[0]] for batch in batches(lengths, 16)]
    assert firsts != sorted(firsts)
    assert any(a > b for a, b in zip(firsts[:8], firsts[1:9], strict=True))


def test_sequences_of_one_length_still_change_their_company() -> None:
    assert {frozenset(b) for b in batches([7] * 64, 8, 1)} != {frozenset(b) for b in batches([7] * 64, 8, 2)}


# -- errors ------------------------------------------------------------------------------------------------------------


def test_relative_square_by_hand() -> None:
    hidden_ND = torch.tensor([[3.0, 4.0], [1.0, 1.0], [0.0, 2.0]])
    target_ND = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    torch.testing.assert_close(relative_square(hidden_ND, target_ND), torch.tensor((16 / 9 + 0 + 1) / 3))
    assert relative_square(hidden_ND[:0], target_ND[:0]) == 0
