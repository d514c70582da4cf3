"""A release: parts built again out of its tensors give the same, and nobody gets more than is needed."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gaisnet.config import DevicePrecision, WireSettings
from gaisnet.config.learning import ModelSettings
from gaisnet.errors import ModelError
from gaisnet.messages import ModelRelease
from gaisnet.models.families import LLAMA_SHAPED, Decoder
from gaisnet.models.foundation import load_foundation
from gaisnet.models.int8 import Int8Linear
from gaisnet.models.parts import Body, CutLayers, Head, Tail, cut_decoder
from gaisnet.models.recipe import Middle, Recipe, make_domain_body
from gaisnet.models.release import ReleasedModel, release_model, restrict, rounded
from gaisnet.transport.codec import Codec
from tests.tiny import VOCAB, round_weights, save_tiny_foundation, tiny_model

pytestmark = pytest.mark.numeric

CUT = CutLayers(1, 1)
LAST_CUT = 2
MIDDLE = Middle(LAST_CUT, 4)
INT8 = Recipe((0, 1, 2, 3, 4, 5), (2, 3))
SMALLER = Recipe((0, 1, 3, 4, 5), (3,))
PLAIN = Recipe((0, 1, 2, 3, 4, 5), ())


def ids() -> Tensor:
    return torch.randint(VOCAB, (3, 9), generator=torch.Generator().manual_seed(7))


def parts_and_release(
    recipe: Recipe, family: str = "llama", tied: bool = True, decoder: Decoder | None = None
) -> tuple[Head, Body, Tail, ModelRelease]:
    """The parts of a domain model in the cloud, and the release of them as it arrives at an edge."""
    decoder = decoder or Decoder(tiny_model(family, tied, initializer_range=0.2))
    head, _, tail = cut_decoder(decoder, CUT)
    stop = 6 - CUT.tail
    calibration_BTD = cut_decoder(decoder, CutLayers(LAST_CUT, 0))[0](ids())
    body = make_domain_body(decoder, CUT.head, stop, recipe, MIDDLE, calibration_BTD)
    release = release_model(decoder, body, recipe.int8, LAST_CUT, stop)
    return head, body, tail, arrived(release)


def arrived(release: ModelRelease) -> ModelRelease:
    """As it is at the other end of a link."""
    received = Codec(WireSettings()).decode(Codec(WireSettings()).encode(release))
    assert isinstance(received, ModelRelease)
    return received


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding: where a tensor begins in memory decides in which order some processors add."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def layers_named(tensors: Iterable[str]) -> set[int]:
    return {int(name.split(".")[1]) for name in tensors if name.startswith("layers.")}


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [PLAIN, INT8, SMALLER], ids=["float32", "int8", "fewer"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_rebuilt_parts_give_the_same(recipe: Recipe, tied: bool, family: str) -> None:
    head, body, tail, release = parts_and_release(recipe, family, tied)
    model = ReleasedModel(release)
    found_head, found_body = model.head(CUT), model.body(CUT.head, 5)
    found_tail = model.tail(CUT, found_head)
    hidden_BTD = head(ids())
    assert model.num_layers == 6 and found_body.indices == body.indices
    assert_same(found_head(ids()), hidden_BTD)
    assert_same(found_body(hidden_BTD), body(hidden_BTD))
    assert_same(found_tail(body(hidden_BTD)), tail(body(hidden_BTD)))


def test_rebuilt_parts_in_half_precision_give_the_same_and_stay_in_it(tmp_path: Path) -> None:
    folder = save_tiny_foundation(tmp_path, initializer_range=0.2)
    foundation = load_foundation(ModelSettings(foundation=str(folder), dtype="bfloat16"))
    head, body, tail, release = parts_and_release(INT8, decoder=foundation.decoder)
    model = ReleasedModel(release)
    found_head = model.head(CUT)
    logits = model.tail(CUT, found_head)(model.body(1, 5)(found_head(ids())))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, tail(body(head(ids()))))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(LLAMA_SHAPED))
def test_parts_in_few_bits_are_those_of_the_model_so_rounded(
    precision: DevicePrecision, tied: bool, family: str
) -> None:
    model, found_head, found_tail = in_few_bits(precision, family, tied)
    head, _, tail = cut_decoder(Decoder(model), CUT)
    hidden_BTD = head(ids())
    expected = tail(hidden_BTD)
    torch.testing.assert_close(found_head(ids()), hidden_BTD, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found_tail(hidden_BTD), expected, atol=1e-5, rtol=1e-5)
    exact, _, _ = cut_decoder(Decoder(tiny_model(family, tied, initializer_range=0.2)), CUT)
    assert (exact(ids()) - hidden_BTD).abs().max() > 1e-3  # it is rounded


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_gradients_pass_through_parts_in_few_bits(precision: DevicePrecision) -> None:
    model, _, found = in_few_bits(precision)
    _, _, tail = cut_decoder(Decoder(model), CUT)
    grads = []
    for part in (tail, found):
        hidden_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        part(hidden_BTD).logsumexp(-1).sum().backward()
        grads.append(hidden_BTD.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-5)


def in_few_bits(precision: DevicePrecision, family: str = "llama", tied: bool = True) -> tuple[Any, Head, Tail]:
    """A model with its outer weights rounded, and a device's parts out of a release in few bits of one that is not."""
    *_, release = parts_and_release(PLAIN, family, tied)
    held = (*range(CUT.head), 5)
    model = ReleasedModel(arrived(rounded(restrict(release, held), held, precision)))
    head = model.head(CUT)
    return round_weights(tiny_model(family, tied, initializer_range=0.2), held, precision), head, model.tail(CUT, head)


@pytest.mark.parametrize("cut", [CutLayers(0, 1), CutLayers(2, 1)])
def test_devices_with_other_cuts_build_from_the_same_release(cut: CutLayers) -> None:
    head, body, tail, release = parts_and_release(PLAIN)
    expected = tail(body(head(ids())))
    model = ReleasedModel(restrict(release, (*range(cut.head), 5)))
    found_head = model.head(cut)
    edge = ReleasedModel(release).body(CUT.head, 5)
    hidden_BTD = found_head(ids())
    if cut.head < CUT.head:  # the edge begins where its shallowest device stops
        hidden_BTD = head.stack.run(hidden_BTD)
    found = model.tail(cut, found_head)(edge.run(hidden_BTD, cut.head))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rebuilt_parts_are_frozen_and_hold_real_numbers() -> None:
    *_, release = parts_and_release(SMALLER)
    model = ReleasedModel(release)
    head = model.head(CUT)
    for part in (head, model.body(1, 5), model.tail(CUT, head)):
        assert not part.training
        assert not any(p.requires_grad or p.is_meta for p in part.parameters())
        assert not any(b.is_meta for b in part.buffers())


def test_a_tied_vocabulary_head_is_held_once() -> None:
    for tied in (True, False):
        *_, release = parts_and_release(PLAIN, tied=tied)
        head = ReleasedModel(release).head(CUT)
        tail = ReleasedModel(release).tail(CUT, head)
        assert (tail.lm_head.weight is head.embed_tokens.weight) == tied
        assert ("lm_head.weight" in release.tensors) == (not tied)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_tied_vocabulary_head_in_few_bits_is_held_once(precision: DevicePrecision) -> None:
    for tied in (True, False):
        _, head, tail = in_few_bits(precision, tied=tied)
        assert (tail.lm_head.weight is head.embed_tokens.weight) == tied
        matrices = [b for part in (head, tail) for b in part.buffers() if len(b) == VOCAB]
        assert len({b.data_ptr() for b in matrices}) == (1 if tied else 2) * (2 if precision == "int8" else 3)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_local_device_gets_the_middle_as_it_is(precision: DevicePrecision) -> None:
    head, body, _, release = parts_and_release(INT8)
    mine = arrived(rounded(release, (0, 5), precision))
    assert mine.layers == release.layers and mine.int8_layers == release.int8_layers
    hidden_BTD = head(ids())
    assert_same(ReleasedModel(mine).body(CUT.head, 5)(hidden_BTD), body(hidden_BTD))


def test_in_float32_nothing_is_rounded() -> None:
    *_, release = parts_and_release(INT8)
    assert rounded(release, (0, 5), "float32") is release


# -- nobody gets more than is needed -----------------------------------------------------------------------------------


def test_an_edge_gets_no_dropped_layer_and_no_float32_weights_of_an_int8_layer() -> None:
    *_, release = parts_and_release(SMALLER)
    assert release.layers == (0, 1, 3, 4, 5) and release.int8_layers == (3,)
    assert layers_named(release.tensors) == {0, 1, 3, 4, 5}
    rounded = {name: t for name, t in release.tensors.items() if name.startswith("layers.3.") and t.ndim == 2}
    assert len(rounded) == 7 and all(t.dtype == torch.int8 for t in rounded.values())


def test_int8_makes_a_release_small() -> None:
    sizes = []
    for recipe in (PLAIN, INT8):
        *_, release = parts_and_release(recipe)
        sizes.append(
            sum(t.nbytes for name, t in release.tensors.items() if name.startswith(("layers.2.", "layers.3.")))
        )
    assert sizes[1] < 0.35 * sizes[0]


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.31), ("int4", 0.19)])  # narrow rows: scales weigh in
def test_few_bits_make_a_release_small(precision: DevicePrecision, share: float) -> None:
    *_, release = parts_and_release(PLAIN)
    exact = restrict(release, (0, 5))
    small = rounded(exact, (0, 5), precision)
    assert sum(t.nbytes for t in small.tensors.values()) < share * sum(t.nbytes for t in exact.tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_a_device_gets_head_and_tail_only(tied: bool) -> None:
    *_, release = parts_and_release(INT8, tied=tied)
    mine = restrict(release, (0, 5))
    assert mine.layers == (0, 5) and mine.int8_layers == ()
    assert layers_named(mine.tensors) == {0, 5}
    others = {"embed_tokens.weight", "norm.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name in mine.tensors if not name.startswith("layers.")} == others
    with pytest.raises(ModelError, match=r"'layers\.1\.' does not fit"):
        ReleasedModel(mine).head(CutLayers(3, 1))


def test_restricting_keeps_the_int8_layers_that_stay_and_the_release_itself() -> None:
    *_, release = parts_and_release(INT8)
    before = dict(release.tensors)
    assert restrict(release, (0, 3)).int8_layers == (3,)
    assert restrict(release, range(6)) == release
    assert restrict(release, ()).layers == () and layers_named(restrict(release, ()).tensors) == set()
    assert release.tensors == before


def test_layer_1_is_not_layer_10() -> None:
    model = tiny_model(num_hidden_layers=12)
    decoder = Decoder(model)
    _, body, _ = cut_decoder(decoder, CutLayers(1, 0))
    release = release_model(decoder, body, (), 1, 12)
    assert layers_named(restrict(release, (0, 1)).tensors) == {0, 1}
    assert layers_named(restrict(release, (0, 10)).tensors) == {0, 10}


def build(release: ModelRelease) -> None:
    model = ReleasedModel(release)
    head = model.head(CUT)
    model.body(1, 5)
    model.tail(CUT, head)


# -- what is wrong -----------------------------------------------------------------------------------------------------

Spoil = Callable[[ModelRelease], ModelRelease]


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(release: ModelRelease) -> ModelRelease:
        tensors = dict(release.tensors)
        change(tensors)
        return replace(release, tensors=tensors)

    return spoil


def put(name: str, tensor: Tensor) -> Spoil:
    return with_tensors(lambda tensors: tensors.update({name: tensor}))


def lose(name: str) -> Spoil:
    return with_tensors(lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lose("embed_tokens.weight"), "embed_tokens."),
        (put("embed_tokens.weight", torch.zeros(VOCAB, 31)), "embed_tokens."),
        (lose("norm.weight"), "norm."),
        (put("norm.weight", torch.zeros(2)), "norm."),
        (put("lm_head.weight", torch.zeros(VOCAB + 1, 32)), "lm_head."),
        (lose("layers.0.mlp.up_proj.weight"), "layers.0."),
        (put("layers.0.mlp.up_proj.weight", torch.zeros(32, 48)), "layers.0."),
        (put("layers.0.mlp.up_proj.more", torch.zeros(1)), "layers.0."),
        (lose("layers.3.mlp.up_proj.weight_scale"), "layers.3."),
        (put("layers.3.mlp.up_proj.weight_scale", torch.zeros(7)), "layers.3."),
        (put("layers.5.input_layernorm.weight", torch.zeros(31)), "layers.5."),
        (lambda release: replace(release, int8_layers=(2, 3, 4)), "layers.4."),
        (lambda release: replace(release, int8_layers=(2,)), "layers.3."),
        (
            lambda release: replace(release, layers=(0, 1, 2, 3, 4, 5), tensors=restrict(release, (0, 1, 5)).tensors),
            "layers.2.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_a_model_error(spoil: Spoil, where: str) -> None:
    *_, release = parts_and_release(INT8)
    with pytest.raises(ModelError, match=f"(?s)of a release.*{where}.*update both ends"):
        build(spoil(release))


@pytest.mark.parametrize(
    ("name", "dtype"), [("layers.0.mlp.up_proj.weight", torch.int8), ("layers.3.mlp.up_proj.weight", torch.float32)]
)
def test_weights_of_a_wrong_kind_are_a_model_error(name: str, dtype: torch.dtype) -> None:
    *_, release = parts_and_release(INT8)
    with pytest.raises(ModelError, match="of a release"):
        build(put(name, release.tensors[name].to(dtype))(release))


CODES, SHARES, SCALE = (f"embed_tokens.weight.{part}" for part in ("codes", "shares", "scale"))
UP = "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (lose(CODES), "embed_tokens."),
        (lose(SHARES), "embed_tokens."),
        (lose(SCALE), "embed_tokens."),
        (put(CODES, torch.zeros(VOCAB, 32, dtype=torch.uint8)), "embed_tokens."),
        (put(CODES, torch.zeros(VOCAB + 1, 16, dtype=torch.uint8)), "embed_tokens."),
        (put(CODES, torch.zeros(VOCAB, 16, dtype=torch.int8)), "torch.int8 where torch.uint8 belongs"),
        (put(CODES, torch.zeros(VOCAB, 16, dtype=torch.int64)), "torch.int64 where torch.uint8 belongs"),
        (put(SHARES, torch.zeros(VOCAB, 1)), "torch.float32 where torch.uint8 belongs"),
        (put(SHARES, torch.zeros(VOCAB, 2, dtype=torch.uint8)), "embed_tokens."),
        (put(SCALE, torch.zeros(VOCAB)), "embed_tokens."),
        (put(SCALE, torch.zeros(VOCAB, 1, dtype=torch.int32)), "torch.int32 where torch.float32 belongs"),
        (put(SCALE, torch.zeros(VOCAB, 1, dtype=torch.float64)), "torch.float64 where torch.float32 belongs"),
        (put("embed_tokens.weight", torch.zeros(VOCAB, 32)), "embed_tokens."),
        (put("lm_head.weight.codes", torch.zeros(VOCAB, 16, dtype=torch.uint8)), "lm_head."),
        (lose(f"{UP}.scale"), "layers.0."),
        (put(UP, torch.zeros(48, 32)), "layers.0."),
        (lambda release: replace(release, precision="int8"), "embed_tokens."),
        (lambda release: replace(release, precision="float32"), "embed_tokens."),
        (lose("norm.weight"), "norm."),
    ],
)
def test_few_bits_that_do_not_fit_are_a_model_error(spoil: Spoil, where: str) -> None:
    *_, release = parts_and_release(INT8)
    with pytest.raises(ModelError, match=f"(?s)of a release.*{where}.*update both ends"):
        build(spoil(rounded(release, (0, 5), "int4")))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '{"model_type": 3}', '{"model_type": "no-such-family"}']
)
def test_a_configuration_that_cannot_be_read_is_a_model_error(text: str) -> None:
    with pytest.raises(ModelError, match="of a release"):
        ReleasedModel(ModelRelease(text, (), (), {}))


def test_a_family_that_cannot_be_cut_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="family 'gemma' is not supported"):
        ReleasedModel(ModelRelease(tiny_model("gemma").config.to_json_string(), (), (), {}))


def test_int8_layers_are_known_by_their_type() -> None:
    *_, release = parts_and_release(INT8)
    body = ReleasedModel(release).body(1, 5)
    int8 = {i for i in body.indices if any(isinstance(m, Int8Linear) for m in body.layers[str(i)].modules())}
    assert int8 == {2, 3}
