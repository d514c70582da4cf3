"""Split equals unsplit, for every supported family, several cuts, with and without a key-value cache."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.errors import CutError, ModelError
from gaisnet.models.families import LLAMA_SHAPED, Decoder
from gaisnet.models.parts import Body, CutLayers, Head, Tail, cut_decoder
from tests.tiny import NUM_LAYERS, VOCAB, tiny_model

pytestmark = pytest.mark.numeric

CUTS = [CutLayers(0, 0), CutLayers(1, 0), CutLayers(2, 1), CutLayers(3, 2)]
SLIDING: dict[str, Any] = {"sliding_window": 4}


def some_ids(num_rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(VOCAB, (num_rows, length), generator=torch.Generator().manual_seed(7))


def through(parts: tuple[Head, Body, Tail], ids_BT: Tensor) -> Tensor:
    head, body, tail = parts
    logits: Tensor = tail(body(head(ids_BT)))
    return logits


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
@pytest.mark.parametrize("cut", CUTS)
def test_outputs_equal_the_unsplit_model(family: str, cut: CutLayers) -> None:
    model = tiny_model(family, tied=family != "qwen3")
    parts = cut_decoder(Decoder(model), cut)
    torch.testing.assert_close(through(parts, some_ids()), model(some_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_sliding_windows_equal_the_unsplit_model(family: str) -> None:
    changes = SLIDING if family == "mistral" else {**SLIDING, "use_sliding_window": True, "max_window_layers": 3}
    model = tiny_model(family, **changes)
    parts = cut_decoder(Decoder(model), CutLayers(2, 1))
    torch.testing.assert_close(through(parts, some_ids()), model(some_ids()).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
@pytest.mark.parametrize("cut", CUTS)
def test_key_value_caches_in_every_part(family: str, cut: CutLayers) -> None:
    model = tiny_model(family, **(SLIDING if family == "mistral" else {}))
    head, body, tail = cut_decoder(Decoder(model), cut)
    caches = head.new_cache(), body.new_cache(), tail.new_cache()
    ids_BT = some_ids()
    steps = []
    for first, stop in ((0, 6), (6, 7), (7, 9), (9, 11)):
        steps.append(tail(body(head(ids_BT[:, first:stop], caches[0]), caches[1]), caches[2]))
    torch.testing.assert_close(torch.cat(steps, dim=1), model(ids_BT).logits, atol=1e-5, rtol=1e-5)


def test_left_padding_with_a_mask_equals_the_unsplit_model() -> None:
    model = tiny_model()
    head, body, tail = cut_decoder(Decoder(model), CutLayers(2, 1))
    mask_BT = torch.ones(3, 11, dtype=torch.long)
    mask_BT[0, :4] = 0
    hidden_BTD = body(head(some_ids(), attention_mask_BT=mask_BT), attention_mask_BT=mask_BT)
    found = tail(hidden_BTD, attention_mask_BT=mask_BT)
    expected = model(some_ids(), attention_mask=mask_BT, position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(found[mask_BT.bool()], expected[mask_BT.bool()], atol=1e-5, rtol=1e-5)


def test_right_padding_needs_no_mask() -> None:
    model = tiny_model()
    parts = cut_decoder(Decoder(model), CutLayers(1, 0))
    ids_BT = some_ids()
    short = through(parts, ids_BT[:, :5])
    torch.testing.assert_close(through(parts, ids_BT)[:, :5], short, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_every_gradient_equals_the_unsplit_model(cut: CutLayers) -> None:
    whole, split = tiny_model().requires_grad_(True), tiny_model().requires_grad_(True)
    ids_BT = some_ids()
    whole(ids_BT, labels=ids_BT).loss.backward()
    logits = through(cut_decoder(Decoder(split), cut), ids_BT)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
    for (name, expected), found in zip(whole.named_parameters(), split.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
@pytest.mark.parametrize("span", [(1, 5), (4, 5), (5, 5)], ids=str)
def test_picked_rows_are_those_of_a_whole_run(family: str, span: tuple[int, int]) -> None:
    """Outputs and gradients; the last layer alone, and no layer at all, too."""
    _, body, _ = cut_decoder(Decoder(tiny_model(family)), CutLayers(1, 1))
    wanted = torch.tensor([3, 4, 10, 20, 32])
    found: list[tuple[Tensor, Tensor]] = []
    for picking in (False, True):
        hidden_BTD = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()

        def pick(output_BTD: Tensor) -> Tensor:
            return output_BTD.flatten(0, 1)[wanted]

        rows_ND = body.run(hidden_BTD, *span, pick=pick) if picking else pick(body.run(hidden_BTD, *span))
        rows_ND.square().sum().backward()
        assert hidden_BTD.grad is not None
        found.append((rows_ND.detach(), hidden_BTD.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_parts_share_the_models_modules() -> None:
    model = tiny_model()
    head, body, tail = cut_decoder(Decoder(model), CutLayers(2, 1))
    numbers = {id(p) for part in (head, body, tail) for p in part.parameters()}
    assert numbers == {id(p) for p in model.parameters()}
    assert [*head.stack.indices, *body.indices, *tail.stack.indices] == list(range(NUM_LAYERS))


@pytest.mark.parametrize("cut", [CutLayers(-1, 0), CutLayers(6, 0), CutLayers(3, 3), CutLayers(0, -2)])
def test_a_cut_that_leaves_no_body_is_refused(cut: CutLayers) -> None:
    with pytest.raises(CutError, match="the model has 6 layers"):
        cut_decoder(Decoder(tiny_model()), cut)


def test_an_unsupported_family_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="family 'gemma' is not supported.*llama"):
        Decoder(tiny_model("gemma"))
