"""Rows without padding equal each sequence alone: outputs, gradients, for every family, windows and picked rows."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.families import LLAMA_SHAPED, Decoder
from gaisnet.models.packing import Packing
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from tests.tiny import tiny_model

pytestmark = pytest.mark.numeric

DEVICE = torch.device("cpu")
WIDTH = 32
SPAN = 2, 5
LENGTHS = [(5,), (16,), (1, 1), (3, 9, 6), (7, 2, 7, 1, 4, 11)]  # of 5, 16, 2, 18 and 32 rows


def body_of(family: str, window: int | None = None) -> Body:
    changes: dict[str, Any] = {} if window is None else {"sliding_window": window}
    if window is not None and family != "mistral":
        changes |= {"use_sliding_window": True, "max_window_layers": 3}
    return cut_decoder(Decoder(tiny_model(family, initializer_range=0.1, **changes)), CutLayers(0))[1]


def sequences(lengths: Sequence[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(n, WIDTH, generator=generator).requires_grad_() for n in lengths]


def learn(outputs: Sequence[Tensor], lengths: Sequence[int]) -> None:
    """Let every number of every row count otherwise."""
    generator = torch.Generator().manual_seed(9)
    weighted = [
        (out * torch.randn(n, WIDTH, generator=generator)).sum() for out, n in zip(outputs, lengths, strict=True)
    ]
    torch.stack(weighted).sum().backward()


def alone(body: Body, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Outputs of each sequence by itself, and gradients at its input."""
    given = sequences(lengths)
    found = [body.run(sequence[None], *SPAN)[0] for sequence in given]
    learn(found, lengths)
    return found, [sequence.grad for sequence in given]


def packed(body: Body, lengths: Sequence[int]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The same of all as rows of one block."""
    let_attention_be_replaced(body.layers)
    given, packing = sequences(lengths), Packing(lengths, DEVICE)
    found_1ND = body.run(packing.rows(given), *SPAN, packing=packing)
    found = list(found_1ND[0, : sum(lengths)].split(list(lengths)))
    learn(found, lengths)
    return found, [sequence.grad for sequence in given]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_rows_are_those_of_each_sequence_alone(family: str, lengths: tuple[int, ...]) -> None:
    expected, found = alone(body_of(family), lengths), packed(body_of(family), lengths)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_too(family: str) -> None:
    lengths = (3, 12, 6)
    expected, found = alone(body_of(family, window=4), lengths), packed(body_of(family, window=4), lengths)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    whole, _ = alone(body_of(family), lengths)
    assert not torch.allclose(whole[1], expected[0][1], atol=1e-3)  # the window is one


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_all_weights_have_the_same_gradients(family: str) -> None:
    gradients = []
    for run in (alone, packed):
        body = body_of(family)
        body.requires_grad_(True)
        run(body, LENGTHS[3])
        gradients.append({name: p.grad for name, p in body.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 20
    torch.testing.assert_close(gradients[1], gradients[0], atol=5e-5, rtol=1e-4)


def test_picked_rows_are_those_of_a_whole_run() -> None:
    lengths, wanted = (3, 9, 6), torch.tensor([2, 10, 11, 17])
    body = body_of("llama")
    let_attention_be_replaced(body.layers)
    packing = Packing(lengths, DEVICE)
    rows_1ND = packing.rows(sequences(lengths))
    whole_1ND = body.run(rows_1ND, *SPAN, packing=packing)
    picked_ND = body.run(rows_1ND, *SPAN, packing=packing, pick=lambda output_1ND: output_1ND[0, wanted])
    torch.testing.assert_close(picked_ND, whole_1ND[0, wanted], atol=1e-5, rtol=1e-5)


def test_what_fills_a_block_reaches_nothing_and_learns_nothing() -> None:
    lengths = (3, 9, 6)
    body = body_of("llama")
    let_attention_be_replaced(body.layers)
    packing = Packing(lengths, DEVICE)
    rows_1ND = packing.rows(sequences(lengths)).detach()
    num_real, num_rows = sum(lengths), rows_1ND.shape[1]
    assert num_rows == 32
    other_1ND = rows_1ND.clone()
    other_1ND[:, num_real:] = 1e3
    found = []
    for each_1ND in (rows_1ND, other_1ND):
        each_1ND.requires_grad_()
        out_1ND = body.run(each_1ND, *SPAN, packing=packing)[:, :num_real]
        out_1ND.square().sum().backward()
        assert each_1ND.grad is not None
        assert not each_1ND.grad[:, num_real:].any()
        found.append((out_1ND.detach(), each_1ND.grad[:, :num_real]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_without_a_replacement_the_layers_attend_as_before() -> None:
    body, fresh = body_of("llama"), body_of("llama")
    let_attention_be_replaced(body.layers)
    outputs = []
    for layers in (body, fresh):
        hidden_BTD = torch.stack([sequences((9,))[0].detach()] * 2).requires_grad_()
        outputs.append(layers(hidden_BTD))
        outputs[-1].square().sum().backward()
        outputs.append(hidden_BTD.grad)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert fresh.config._attn_implementation == body.config._attn_implementation == "sdpa"
