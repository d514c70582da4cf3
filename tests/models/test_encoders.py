"""Split encoders equal the unsplit model of transformers: outputs, gradients, an optimizer step; padded and packed."""

from collections.abc import Sequence
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel, PreTrainedModel, ViTModel

from gaisnet.errors import CutError, DataError, ModelError
from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.encoders import EncoderBody, EncoderHead, cut_encoder, first_rows
from gaisnet.models.families import ENCODERS, Decoder, Encoder
from gaisnet.models.packing import Packing
from gaisnet.models.parts import CutLayers
from tests.tiny import NUM_LAYERS, VOCAB, tiny_encoder, tiny_inputs, tiny_model

pytestmark = pytest.mark.numeric

FAMILIES = sorted(ENCODERS)
CUTS = [CutLayers(0), CutLayers(1), CutLayers(3), CutLayers(5)]
LENGTHS = [(7,), (5, 5, 5), (1, 1), (3, 9, 6), (7, 2, 16, 1, 4, 2)]
LABELS = torch.tensor([2, 0, 1, 0, 2, 1])
DEVICE = torch.device("cpu")


def cut(family: str, head: int, **changes: Any) -> tuple[EncoderHead, EncoderBody]:
    return cut_encoder(Encoder(tiny_encoder(family, **changes)), CutLayers(head))


def texts(lengths: Sequence[int]) -> list[Tensor]:
    """Token ids of unequal lengths."""
    return [tiny_inputs("bert", 1, n, seed)[0] for seed, n in enumerate(lengths)]


def padded(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same as one batch, padded with a token of its own, and which positions are real."""
    ids_BT = pad_sequence(texts(lengths), batch_first=True, padding_value=VOCAB - 1)
    return ids_BT, pad_sequence([torch.ones(n, dtype=torch.long) for n in lengths], batch_first=True)


# -- split equals unsplit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", CUTS, ids=str)
def test_outputs_equal_the_unsplit_model(family: str, at: CutLayers) -> None:
    model = tiny_encoder(family)
    head, body = cut_encoder(Encoder(model), at)
    inputs = tiny_inputs(family)
    expected = model(inputs)
    assert expected.logits.std(0).min() > 0.05  # examples differ
    torch.testing.assert_close(body.classify(first_rows(body(head(inputs)))), expected.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at", CUTS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_a_padded_batch_equals_each_text_alone(at: CutLayers, lengths: tuple[int, ...]) -> None:
    model = tiny_encoder("bert")
    head, body = cut_encoder(Encoder(model), at)
    ids_BT, mask_BT = padded(lengths)
    found = body.classify(first_rows(body(head(ids_BT, mask_BT), attention_mask_BT=mask_BT)))
    alone = torch.cat([model(ids_T[None]).logits for ids_T in texts(lengths)])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, model(ids_BT, attention_mask=mask_BT).logits, atol=1e-5, rtol=1e-5)


def test_padding_is_seen_where_no_mask_says_that_it_is_none() -> None:
    head, body = cut("bert", 1)
    ids_BT, mask_BT = padded((3, 9))
    hidden_BTD = body(head(ids_BT, mask_BT), attention_mask_BT=mask_BT)
    assert (body(head(ids_BT)) - hidden_BTD)[0, :3].abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("at", CUTS, ids=str)
@pytest.mark.parametrize("way", ["padded", "packed"])
def test_gradients_and_a_step_equal_those_of_the_unsplit_model(family: str, at: CutLayers, way: str) -> None:
    """Everything learns, embeddings too; texts are of unequal lengths."""
    whole, split = (tiny_encoder(family).requires_grad_(True) for _ in range(2))
    lengths = (7,) * 4 if family == "vit" else (3, 9, 6, 1)
    labels_B = LABELS[:4]
    inputs, mask_BT = (tiny_inputs(family, 4), None) if family == "vit" else padded(lengths)
    expected = whole(inputs, attention_mask=mask_BT, labels=labels_B)
    logits = run(split, at, lengths, inputs, mask_BT, way)
    F.cross_entropy(logits, labels_B).backward()
    expected.loss.backward()
    torch.testing.assert_close(logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert_same_gradients(split, whole)
    for model in (split, whole):
        torch.optim.AdamW(model.parameters(), lr=0.01).step()
    for (name, parameter), found in zip(whole.named_parameters(), split.parameters(), strict=True):
        settled = torch.ones(()) if parameter.grad is None else parameter.grad.abs() > 1e-5  # Adam divides by its size
        torch.testing.assert_close(found * settled, parameter * settled, atol=1e-4, rtol=1e-4, msg=name)


def run(
    model: PreTrainedModel, at: CutLayers, lengths: Sequence[int], inputs: Tensor, mask_BT: Tensor | None, way: str
) -> Tensor:
    """Logits of a split model, the body's part as a padded batch or as rows without padding."""
    head, body = cut_encoder(Encoder(model), at)
    hidden_BTD = head(inputs, mask_BT)
    if way == "padded":
        return body.classify(body.run(hidden_BTD, attention_mask_BT=mask_BT, pick=first_rows))
    let_attention_be_replaced(body.layers)
    packing = Packing(lengths, DEVICE)
    rows_1ND = packing.rows([rows[:n] for rows, n in zip(hidden_BTD, lengths, strict=True)])
    firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    return body.classify(body.run(rows_1ND, packing=packing, pick=lambda out_1ND: out_1ND[0, firsts]))


def assert_same_gradients(found: nn.Module, expected: nn.Module) -> None:
    num = 0
    for (name, parameter), mine in zip(expected.named_parameters(), found.parameters(), strict=True):
        if parameter.grad is None:
            assert mine.grad is None, name
            continue
        num += 1
        torch.testing.assert_close(mine.grad, parameter.grad, atol=2e-5, rtol=1e-3, msg=name)
    assert num > 100


# -- rows without padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows_are_those_of_each_sequence_alone(family: str, lengths: tuple[int, ...]) -> None:
    """Outputs at every row, and gradients at the input, of layers in the middle."""
    found = []
    for together in (False, True):
        _, body = cut(family, 1)
        generator = torch.Generator().manual_seed(4)
        given = [torch.randn(n, 32, generator=generator).requires_grad_() for n in lengths]
        if together:
            let_attention_be_replaced(body.layers)
            packing = Packing(lengths, DEVICE)
            rows_1ND = body.run(packing.rows(given), 2, 5, packing=packing)
            outputs = list(rows_1ND[0, : sum(lengths)].split(list(lengths)))
        else:
            outputs = [body.run(rows[None], 2, 5)[0] for rows in given]
        torch.cat([(out * torch.randn(out.shape, generator=generator)).flatten() for out in outputs]).sum().backward()
        found.append((outputs, [rows.grad for rows in given]))
    torch.testing.assert_close(found[1], found[0], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("span", [(1, 5), (4, 5), (5, 5)], ids=str)
def test_picked_rows_are_those_of_a_whole_run(family: str, span: tuple[int, int]) -> None:
    _, body = cut(family, 1)
    hidden_BTD = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(2))
    expected_BD = body.run(hidden_BTD, *span)[:, 0]
    torch.testing.assert_close(body.run(hidden_BTD, *span, pick=first_rows), expected_BD, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_that_may_be_replaced_attends_as_before(family: str) -> None:
    (head, body), (_, fresh) = cut(family, 2), cut(family, 2)
    let_attention_be_replaced(body.layers)
    hidden_BTD = head(tiny_inputs(family))
    assert torch.equal(body(hidden_BTD), fresh(hidden_BTD))


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_share_the_models_modules(family: str) -> None:
    model = tiny_encoder(family)
    head, body = cut_encoder(Encoder(model), CutLayers(2))
    assert {id(p) for part in (head, body) for p in part.parameters()} == {id(p) for p in model.parameters()}
    assert [*head.stack.indices, *body.indices] == list(range(NUM_LAYERS))


@pytest.mark.parametrize(("family", "kind"), [("vit", ViTModel), ("bert", BertModel)])
def test_a_model_without_a_classifier_is_cut_too(family: str, kind: type[PreTrainedModel]) -> None:
    model = kind(tiny_encoder(family).config).eval()
    head, body = cut_encoder(Encoder(model), CutLayers(2))
    inputs = tiny_inputs(family)
    expected = model(inputs)
    first_BD = expected.pooler_output if family == "bert" else expected.last_hidden_state[:, 0]
    rows_BD = first_rows(body(head(inputs)))
    torch.testing.assert_close(body.ending(rows_BD[:, None]).flatten(1), first_BD, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelError, match=f"'{family}': it has no classifier.*put an adapter in"):
        body.classify(rows_BD)


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_at_the_end_of_an_encoder_are_the_bodys(family: str) -> None:
    with pytest.raises(CutError, match="cut.tail is 1 but the last layers of an encoder learn.*use 0"):
        cut_encoder(Encoder(tiny_encoder(family)), CutLayers(1, 1))


@pytest.mark.parametrize("at", [CutLayers(-1), CutLayers(6)])
def test_a_cut_that_leaves_no_body_is_refused(at: CutLayers) -> None:
    with pytest.raises(CutError, match="the model has 6 layers"):
        cut_encoder(Encoder(tiny_encoder("vit")), at)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_is_no_decoder_and_keeps_no_keys(family: str) -> None:
    model = tiny_encoder(family)
    with pytest.raises(ModelError, match=f"family '{family}' is not supported; use a decoder of"):
        Decoder(model)
    _, body = cut_encoder(Encoder(model), CutLayers(1))
    with pytest.raises(ModelError, match="it is an encoder.*run whole sequences"):
        body.new_cache()


def test_a_decoder_is_no_encoder() -> None:
    with pytest.raises(ModelError, match="family 'llama' is not supported for classification; use an encoder of"):
        Encoder(tiny_model())


def test_a_bert_that_is_a_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="says is_decoder"):
        Encoder(tiny_encoder("bert", is_decoder=True))


def test_a_bert_without_its_pooler_is_refused() -> None:
    config = cast(BertConfig, tiny_encoder("bert").config)
    with pytest.raises(ModelError, match="built without its pooler; load the model with it"):
        Encoder(BertModel(config, add_pooling_layer=False))


@pytest.mark.parametrize(
    ("family", "inputs", "found"),
    [
        ("vit", torch.zeros(2, 3, 8, 12), "of shape \\(2, 3, 8, 12\\).*pixels of shape \\(3, 12, 8\\); give"),
        ("vit", torch.zeros(2, 1, 12, 8), "of shape \\(2, 1, 12, 8\\).*pixels of shape \\(3, 12, 8\\); give"),
        ("vit", torch.zeros(3, 12, 8), "of shape \\(3, 12, 8\\)"),
        ("vit", torch.zeros(2, 3, 12, 8, dtype=torch.long), "torch.int64, but float pixels"),
        ("vit", torch.ones(1, 4, dtype=torch.long), "of shape \\(1, 4\\)"),
        ("bert", torch.full((1, 4), VOCAB), f"of shape \\(1, 4\\).*but tokens below {VOCAB}; give"),
        ("bert", torch.ones(1, 513, dtype=torch.long), "of shape \\(1, 513\\).*but texts of at most 512 tokens"),
        ("bert", torch.zeros(2, 3, 12, 8), "of shape \\(2, 3, 12, 8\\)"),
        ("bert", torch.zeros(2, 4), "torch.float32, but texts"),
    ],
)
def test_inputs_that_the_embeddings_do_not_take_are_refused(family: str, inputs: Tensor, found: str) -> None:
    head, _ = cut(family, 1)
    with pytest.raises(DataError, match=f"(?s)a '{family}' encoder's input: its embeddings do not take .*{found}"):
        head(inputs)


def test_images_of_one_size_for_both_sides_are_taken() -> None:
    head, _ = cut("vit", 1, image_size=8)
    assert head(torch.zeros(2, 3, 8, 8)).shape == (2, 5, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_embeddings_raise_for_want_of_memory_is_not_blamed_on_the_input(family: str) -> None:
    head, _ = cut(family, 1)
    error = torch.OutOfMemoryError("out of memory")
    head.embeddings.forward = Mock(side_effect=error)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        head(tiny_inputs(family))
    assert raised.value is error
