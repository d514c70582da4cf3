"""One forward over sessions that differ in everything equals each session alone, with the caches of transformers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.models.families import LLAMA_SHAPED, Decoder
from gaisnet.models.parts import Body, CutLayers, Layers, cut_decoder
from gaisnet.serving.engine import rows
from gaisnet.serving.engine.rows import BatchedLayers, BatchEntry, KVCache
from tests.serving.models import lively_model
from tests.tiny import NUM_LAYERS

pytestmark = pytest.mark.numeric

LENGTHS = (9, 7, 12)


def sequences() -> list[Tensor]:
    return [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]


def body_of(family: str = "llama", window: bool = False) -> Body:
    sliding = {"sliding_window": 4} if window else {}
    if window and family != "mistral":
        sliding |= {"use_sliding_window": True, "max_window_layers": 3}
    return cut_decoder(Decoder(lively_model(family, **sliding)), CutLayers(0))[1]


def in_turns(layers: BatchedLayers, ranges: list[tuple[int, int]], turns: list[dict[int, int]]) -> list[Tensor]:
    """Outputs of the sequences, of which each turn takes so many rows of some."""
    caches = [KVCache() for _ in LENGTHS]
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    for turn in turns:
        shares = [
            BatchEntry(sequences()[i][caches[i].length : caches[i].length + num], caches[i], *ranges[i])
            for i, num in turn.items()
        ]
        for i, rows_TD in zip(turn, layers.run_sessions(shares), strict=True):
            outputs[i].append(rows_TD)
    return [torch.cat(rows) for rows in outputs]


# The fourth is of single rows only, behind 6, 2 and 9: with a window of 4 they see 4, 3 and 4.
TURNS = [{0: 4, 1: 2, 2: 5}, {0: 1, 2: 3}, {0: 1, 2: 1}, {0: 1, 1: 1, 2: 1}, {1: 3, 0: 2, 2: 1}, {2: 1, 1: 1}]


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_sessions_do_not_see_each_other(family: str) -> None:
    found = in_turns(BatchedLayers(body_of(family)), [(0, NUM_LAYERS)] * 3, TURNS)
    for rows_TD, sequence_TD in zip(found, sequences(), strict=True):
        torch.testing.assert_close(rows_TD, body_of(family)(sequence_TD[None])[0], atol=2e-4, rtol=1e-3)


def test_long_pasts_are_attended_to_alone_and_short_ones_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_SHORT", 7)
    sizes = []
    together = rows._attend_together

    def counted(spans: Any, *args: Any) -> Tensor:
        sizes.append(len(spans.together))
        return together(spans, *args)

    monkeypatch.setattr(rows, "_attend_together", counted)
    found = in_turns(BatchedLayers(body_of()), [(0, NUM_LAYERS)] * 3, TURNS)
    for rows_TD, sequence_TD in zip(found, sequences(), strict=True):
        torch.testing.assert_close(rows_TD, body_of()(sequence_TD[None])[0], atol=2e-4, rtol=1e-3)
    assert sizes == [2] * NUM_LAYERS  # the first and the second, when the third has nine


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows(family: str) -> None:
    found = in_turns(BatchedLayers(body_of(family, window=True)), [(0, NUM_LAYERS)] * 3, TURNS)
    for rows_TD, sequence_TD in zip(found, sequences(), strict=True):
        torch.testing.assert_close(rows_TD, body_of(family, window=True)(sequence_TD[None])[0], atol=2e-4, rtol=1e-3)


def test_every_session_has_its_layers() -> None:
    ranges = [(0, 4), (2, 6), (3, 5)]
    found = in_turns(BatchedLayers(body_of()), ranges, TURNS)
    for rows_TD, sequence_TD, (first, stop) in zip(found, sequences(), ranges, strict=True):
        expected = body_of().run(sequence_TD[None], first, stop)[0]
        torch.testing.assert_close(rows_TD, expected, atol=2e-4, rtol=1e-3)


def test_sessions_whose_layers_do_not_touch() -> None:
    found = in_turns(BatchedLayers(body_of()), [(0, 2), (4, 6), (5, 6)], TURNS)
    torch.testing.assert_close(found[0], body_of().run(sequences()[0][None], 0, 2)[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found[2], body_of().run(sequences()[2][None], 5)[0], atol=2e-4, rtol=1e-3)


def test_a_dropped_layer_is_passed_over() -> None:
    whole = body_of()
    kept = {i: whole.layers[str(i)] for i in (0, 1, 3, 4, 5)}
    thinner = Layers(whole.config, kept, whole.rotary_emb)
    expected = [thinner.run(sequence_TD[None])[0] for sequence_TD in sequences()]
    found = in_turns(BatchedLayers(thinner), [(0, NUM_LAYERS)] * 3, TURNS)
    for rows_TD, expected_TD in zip(found, expected, strict=True):
        torch.testing.assert_close(rows_TD, expected_TD, atol=2e-4, rtol=1e-3)


def test_a_part_without_layers_gives_back_its_rows() -> None:
    head = cut_decoder(Decoder(lively_model()), CutLayers(0))[0]
    found = BatchedLayers(head.stack).run_sessions([BatchEntry(sequences()[0], KVCache(), 0, 0)])
    torch.testing.assert_close(found[0], sequences()[0])


def test_the_layers_learn_and_attend_as_before() -> None:
    body, fresh = body_of(), body_of()
    BatchedLayers(body)
    outputs = []
    for layers in (body, fresh):
        hidden_BTD = torch.stack([sequences()[0]] * 2).requires_grad_(True)
        outputs.append(layers(hidden_BTD))
        outputs[-1].square().sum().backward()
        outputs.append(hidden_BTD.grad)
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert fresh.config._attn_implementation == body.config._attn_implementation


def test_a_forward_that_fails_leaves_the_caches_as_they_were() -> None:
    layers, cache = BatchedLayers(body_of()), KVCache()
    layers.run_sessions([BatchEntry(sequences()[0][:4], cache, 0, NUM_LAYERS)])
    with pytest.raises(RuntimeError):
        layers.run_sessions([BatchEntry(sequences()[0][:2, :7], cache, 0, NUM_LAYERS)])
    assert cache.length == 4
    rows_TD = layers.run_sessions([BatchEntry(sequences()[0][4:], cache, 0, NUM_LAYERS)])[0]
    torch.testing.assert_close(rows_TD, body_of()(sequences()[0][None])[0, 4:], atol=2e-4, rtol=1e-3)
