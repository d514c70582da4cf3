"""Batches of a split step: selected rows, their owners, and gradients with failed owners or an anchor loss."""

import pytest
import torch
from torch import Tensor

from gaisnet.messages import BodyOutputGrad
from gaisnet.models.ragged import Ragged
from gaisnet.tiers.split.activations import Activations
from gaisnet.tiers.split.step import AnchorLoss, Batch, Member, pick_examples

pytestmark = pytest.mark.numeric

WIDTH = 3


def numbered(sequence: int, length: int) -> Tensor:
    """Return rows numbered 100 * sequence + position."""
    return (100.0 * sequence + torch.arange(length))[:, None].expand(-1, WIDTH).contiguous()


def member(name: str, examples: dict[int, tuple[int, int]]) -> Member:
    """Make a member from numbered examples: positions, and how many of the last ones carry a label."""
    rows_ND = torch.cat([numbered(number, length) for number, (length, _) in examples.items()])
    lengths, num_labels = zip(*examples.values(), strict=True)
    return Member(name, Activations(Ragged(rows_ND, lengths), num_labels, 1))


MEMBERS = (member("a", {1: (4, 2), 2: (3, 1)}), member("b", {3: (5, 3)}))


def anchor_loss(weight: float = 0.5) -> AnchorLoss:
    targets_ND = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(3))
    return AnchorLoss([numbered(7, 2), numbered(8, 4)], targets_ND, weight)


def found_in(batch: Batch) -> list[int]:
    """Return the numbers of the selected rows."""
    return batch.select_rows(batch.rows_1ND)[:, 0].int().tolist()


def test_owners_get_their_label_rows_and_the_pull_all_but_the_first() -> None:
    batch = Batch.from_picks(MEMBERS, pick_examples(MEMBERS, [2, 1, 0]), anchor_loss(), selection="last")
    assert found_in(batch) == [102, 103, 202, 302, 303, 304, 701, 801, 802, 803]
    outputs = batch.outputs_by_owner(batch.select_rows(batch.rows_1ND), step=6)
    assert {name: output.rows_ND[:, 0].int().tolist() for name, output in outputs.items()} == {
        "a": [102, 103, 202],
        "b": [302, 303, 304],
    }
    assert {name: output.examples_E.tolist() for name, output in outputs.items()} == {"a": [0, 1], "b": [0]}
    assert {(output.step, output.num_labels_total) for output in outputs.values()} == {(6, 6)}


def test_a_tail_with_layers_gets_every_row() -> None:
    batch = Batch.from_picks(MEMBERS, pick_examples(MEMBERS, [2, 1]), None, selection="every")
    assert found_in(batch) == [200, 201, 202, 300, 301, 302, 303, 304]
    assert batch.num_labels == 4


def test_of_a_batch_without_some_member_nothing_goes_to_it() -> None:
    batch = Batch.from_picks(MEMBERS, pick_examples(MEMBERS, [2]), anchor_loss(), selection="last")
    assert found_in(batch) == [302, 303, 304, 701, 801, 802, 803]
    assert set(batch.shares) == {"b"}


@pytest.mark.parametrize("answered", [("a", "b"), ("a",), ("b",)])
def test_the_gradient_is_that_of_those_that_answered_and_of_the_whole_pull(answered: tuple[str, ...]) -> None:
    given = anchor_loss()
    batch = Batch.from_picks(MEMBERS, pick_examples(MEMBERS, [0, 1, 2]), given, selection="last")
    found_ND = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    replies = {name: BodyOutputGrad(0, 1.0, torch.full((3, WIDTH), 2.0)) for name in answered}
    grad_ND = batch.merge_gradients(found_ND, replies)

    scale = 6 / (3 * len(answered))  # six labels in all, three of each
    for name, rows in (("a", slice(0, 3)), ("b", slice(3, 6))):
        assert (grad_ND[rows] == (2.0 * scale if name in answered else 0.0)).all()
    errors = [
        (found - target).square().sum() / target.square().sum()
        for found, target in zip(found_ND[6:], given.targets_ND, strict=True)
    ]
    (0.5 * torch.stack(errors).mean()).backward()
    assert found_ND.grad is not None
    torch.testing.assert_close(grad_ND[6:], found_ND.grad[6:])


def test_text_of_one_token_each_pulls_nowhere() -> None:
    given = AnchorLoss([numbered(7, 1)], torch.empty(0, WIDTH), 0.5)
    batch = Batch.from_picks(MEMBERS, pick_examples(MEMBERS, [1]), given, selection="last")
    assert found_in(batch) == [202]
    grad_ND = batch.merge_gradients(torch.ones(1, WIDTH), {"a": BodyOutputGrad(0, 1.0, torch.ones(1, WIDTH))})
    assert torch.equal(grad_ND, torch.ones(1, WIDTH))
