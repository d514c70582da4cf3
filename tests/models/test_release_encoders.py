"""A release of an encoder: parts built again out of its tensors give the same, and nobody gets more than is needed."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel, ViTModel

from gaisnet.config import DevicePrecision, WireSettings
from gaisnet.config.learning import DomainSettings
from gaisnet.errors import ModelError
from gaisnet.messages import ModelRelease
from gaisnet.models.encoders import EncoderBody, EncoderHead, cut_encoder, first_rows
from gaisnet.models.families import ENCODERS, Decoder, Encoder
from gaisnet.models.int8 import Int8Linear
from gaisnet.models.parts import CutLayers, cut_decoder
from gaisnet.models.recipe import Middle, Recipe, choose_recipe, make_domain_body
from gaisnet.models.release import ReleasedEncoder, ReleasedModel, release_encoder, release_model, restrict, rounded
from gaisnet.row_quant import from_int4, from_int8, to_int4, to_int8
from gaisnet.transport.codec import Codec
from tests.tiny import NUM_LAYERS, tiny_encoder, tiny_inputs, tiny_model

pytestmark = pytest.mark.numeric

CUT = CutLayers(1)
LAST_CUT = 2
MIDDLE = Middle(LAST_CUT, 4)
INT8 = Recipe((0, 1, 2, 3, 4, 5), (2, 3))
SMALLER = Recipe((0, 1, 3, 4, 5), (3,))
PLAIN = Recipe((0, 1, 2, 3, 4, 5), ())
FAMILIES = sorted(ENCODERS)


def parts_and_release(
    family: str, recipe: Recipe = PLAIN, model: PreTrainedModel | None = None
) -> tuple[EncoderHead, EncoderBody, ModelRelease]:
    """Parts of a domain model in the cloud, and the release of them as it arrives at an edge."""
    encoder = Encoder(model or tiny_encoder(family))
    deep, _ = cut_encoder(encoder, CutLayers(LAST_CUT))
    body = make_domain_body(encoder, CUT.head, NUM_LAYERS, recipe, MIDDLE, deep(tiny_inputs(family)))
    assert isinstance(body, EncoderBody)
    return cut_encoder(encoder, CUT)[0], body, arrived(release_encoder(encoder, body, recipe.int8, LAST_CUT))


def arrived(release: ModelRelease) -> ModelRelease:
    received = Codec(WireSettings()).decode(Codec(WireSettings()).encode(release))
    assert isinstance(received, ModelRelease)
    return received


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [PLAIN, INT8, SMALLER], ids=["float32", "int8", "fewer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_parts_give_the_same(family: str, recipe: Recipe) -> None:
    head, body, release = parts_and_release(family, recipe)
    model = ReleasedEncoder(release)
    found_head, found_body = model.head(CUT), model.body(CUT.head)
    hidden_BTD = head(tiny_inputs(family))
    assert model.num_layers == 6 and model.family is ENCODERS[family] and found_body.indices == body.indices
    torch.testing.assert_close(found_head(tiny_inputs(family)), hidden_BTD, atol=1e-5, rtol=1e-5)
    rows_BD = first_rows(body(hidden_BTD))
    torch.testing.assert_close(first_rows(found_body(hidden_BTD)), rows_BD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_body.classify(rows_BD), body.classify(rows_BD), atol=1e-5, rtol=1e-5)
    released = {name.partition(".")[0] for name in release.tensors}
    assert released == {"embeddings", "layers", "ending", "classifier"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_parts_in_half_precision_stay_in_it(family: str) -> None:
    whole = tiny_encoder(family)
    nn.Module.to(whole, torch.bfloat16)
    head, body, release = parts_and_release(family, INT8, whole)
    model = ReleasedEncoder(release)
    hidden_BTD = model.head(CUT)(tiny_inputs(family))
    assert hidden_BTD.dtype == torch.bfloat16
    assert torch.equal(hidden_BTD, head(tiny_inputs(family)))
    found = model.body(CUT.head)
    assert torch.equal(found(hidden_BTD), body(hidden_BTD))
    assert found.classify(first_rows(found(hidden_BTD))).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", [INT8, SMALLER], ids=["int8", "fewer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_int8_middle_is_near_the_model_and_the_rest_is_as_it_was(family: str, recipe: Recipe) -> None:
    _, body, release = parts_and_release(family, recipe)
    found = ReleasedEncoder(release).body(CUT.head)
    int8 = {i for i in found.indices if any(isinstance(m, Int8Linear) for m in found.layers[str(i)].modules())}
    assert int8 == set(recipe.int8)
    _, exact = cut_encoder(Encoder(tiny_encoder(family)), CUT)
    hidden_BTD = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(1))
    whole_BTD = exact.run(hidden_BTD, 3, 4)
    error = (found.run(hidden_BTD, 3, 4) - whole_BTD).norm() / whole_BTD.norm()
    assert 1e-5 < error < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_that_changes_least_is_dropped(family: str) -> None:
    encoder = Encoder(tiny_encoder(family))
    _, body = cut_encoder(encoder, CutLayers(0))
    head, _ = cut_encoder(encoder, CutLayers(LAST_CUT))
    settings = DomainSettings(keep_layers=NUM_LAYERS - 1, precision="float32")
    hidden_BTD = head(tiny_inputs(family))
    (dropped,) = set(range(NUM_LAYERS)) - set(choose_recipe(settings, MIDDLE, body, hidden_BTD).kept)
    target_BTD = body.run(hidden_BTD, 2, 4)[:, 1:]
    errors = {}
    for layer, other in ((2, 3), (3, 2)):
        without_BTD = body.run(hidden_BTD, other, other + 1)[:, 1:]
        errors[layer] = ((without_BTD - target_BTD).norm(dim=-1) / target_BTD.norm(dim=-1)).square().mean()
    assert dropped == min(errors, key=lambda layer: float(errors[layer]))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_heads_layers_in_few_bits_are_those_of_the_model_so_rounded(family: str, precision: DevicePrecision) -> None:
    *_, release = parts_and_release(family)
    found = ReleasedEncoder(arrived(rounded(restrict(release, (0, 1)), (0, 1), precision))).head(CutLayers(2))
    model = tiny_encoder(family)
    for layer in list(Encoder(model).layers)[:2]:
        for weight in (p for p in layer.parameters() if p.ndim == 2):
            exact = weight.data
            weight.data = (
                from_int8(*to_int8(exact)) if precision == "int8" else from_int4(*to_int4(exact), exact.shape[1])
            )
    head, _ = cut_encoder(Encoder(model), CutLayers(2))
    torch.testing.assert_close(found(tiny_inputs(family)), head(tiny_inputs(family)), atol=1e-5, rtol=1e-5)
    exact_head, _ = cut_encoder(Encoder(tiny_encoder(family)), CutLayers(2))
    assert (exact_head(tiny_inputs(family)) - head(tiny_inputs(family))).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_parts_are_frozen_and_hold_real_numbers(family: str) -> None:
    *_, release = parts_and_release(family, SMALLER)
    model = ReleasedEncoder(release)
    for part in (model.head(CUT), model.body(1)):
        assert not part.training
        assert not any(p.requires_grad or p.is_meta for p in part.parameters())
        assert not any(b.is_meta for b in part.buffers())


@pytest.mark.parametrize(("family", "kind"), [("vit", ViTModel), ("bert", BertModel)])
def test_a_model_that_was_made_for_no_task_has_no_classifier(family: str, kind: type[PreTrainedModel]) -> None:
    *_, release = parts_and_release(family, model=kind(tiny_encoder(family).config).eval())
    assert not any(name.startswith("classifier.") for name in release.tensors)
    assert ReleasedEncoder(release).body(1).classifier is None


# -- nobody gets more than is needed -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_gets_its_head_only(family: str) -> None:
    head, _, release = parts_and_release(family)
    mine = restrict(release, (0,))
    assert {name.partition(".")[0] for name in mine.tensors} == {"embeddings", "layers"}
    assert mine.layers == (0,)
    found = ReleasedEncoder(mine).head(CUT)
    torch.testing.assert_close(found(tiny_inputs(family)), head(tiny_inputs(family)), atol=1e-5, rtol=1e-5)
    assert restrict(release, range(6)) == release


# -- what is wrong -----------------------------------------------------------------------------------------------------


def spoilt(release: ModelRelease, change: Callable[[dict[str, Tensor]], object]) -> ModelRelease:
    tensors = dict(release.tensors)
    change(tensors)
    return replace(release, tensors=tensors)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda t: t.pop("embeddings.cls_token"), "embeddings."),
        (lambda t: t.update({"embeddings.position_embeddings": torch.zeros(1, 6, 32)}), "embeddings."),
        (lambda t: t.pop("layers.0.mlp.fc1.weight"), "layers.0."),
        (
            lambda t: t.update({"layers.3.mlp.fc1.weight": torch.zeros(48, 32)}),
            "torch.float32 where torch.int8 belongs",
        ),
        (lambda t: t.update({"layers.4.mlp.fc1.more": torch.zeros(1)}), "layers.4."),
        (lambda t: t.pop("ending.weight"), "ending."),
        (lambda t: t.update({"ending.weight": torch.zeros(31)}), "ending."),
        (lambda t: t.update({"classifier.weight": torch.zeros(7, 32)}), "classifier."),
        (lambda t: t.pop("classifier.bias"), "classifier."),
    ],
)
def test_tensors_that_do_not_fit_are_a_model_error(change: Callable[[dict[str, Tensor]], object], where: str) -> None:
    *_, release = parts_and_release("vit", INT8)
    with pytest.raises(ModelError, match=f"(?s)of a release.*{where}.*update both ends"):
        model = ReleasedEncoder(spoilt(release, change))
        model.head(CUT)
        model.body(1)


def test_a_release_of_the_other_kind_is_a_model_error() -> None:
    *_, release = parts_and_release("bert")
    with pytest.raises(ModelError, match="family 'bert' is not supported; use a decoder"):
        ReleasedModel(release)
    decoder = Decoder(tiny_model())
    other = release_model(decoder, cut_decoder(decoder, CUT)[1], (), 1, 6)
    with pytest.raises(ModelError, match="family 'llama' is not supported for classification; use an encoder"):
        ReleasedEncoder(other)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "no-such-family"}'])
def test_a_configuration_that_cannot_be_read_is_a_model_error(text: str) -> None:
    with pytest.raises(ModelError, match="of a release"):
        ReleasedEncoder(ModelRelease(text, (), (), {}))


def test_what_a_configuration_says_gets_no_memory_before_the_tensors_are_seen_to_fit() -> None:
    *_, release = parts_and_release("bert")
    raw = json.loads(release.config_json) | {"vocab_size": 2**44}
    with pytest.raises(ModelError, match="'embeddings.word_embeddings.weight' is of shape"):
        ReleasedEncoder(replace(release, config_json=json.dumps(raw))).head(CutLayers(1))
