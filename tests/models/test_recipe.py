"""Recipes: what a domain model keeps of the foundation model, what runs in int8, and what the two share."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gaisnet.config.learning import DomainSettings
from gaisnet.errors import CutError
from gaisnet.models.families import Decoder
from gaisnet.models.int8 import Int8Linear, to_int8
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.recipe import (
    Middle,
    Recipe,
    check_recipe,
    choose_recipe,
    make_domain_body,
    num_parameters,
)
from tests.tiny import NUM_LAYERS, tiny_model

pytestmark = pytest.mark.numeric

MIDDLE = Middle(1, 4)
ALL = tuple(range(NUM_LAYERS))


def settings(keep: object = None, precision: str = "float32") -> DomainSettings:
    return DomainSettings.model_validate({"keep_layers": keep, "precision": precision})


def decoder_and_body(*without_effect: int) -> tuple[Decoder, Body]:
    """A model some of whose layers add nothing to their input."""
    model = tiny_model(initializer_range=0.2)
    decoder = Decoder(model)
    for index in without_effect:
        layer = model.get_decoder().layers[index]
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return decoder, cut_decoder(decoder, CutLayers(1, 0))[1]


def hidden() -> Tensor:
    return torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(3))


def difference(hidden_BTD: Tensor, target_BTD: Tensor) -> float:
    """Mean of |hidden - target|^2 / |target|^2 over all positions but the first, which is an attention sink."""
    errors = [
        float((hidden_D - target_D).norm() / target_D.norm()) ** 2
        for hidden_TD, target_TD in zip(hidden_BTD, target_BTD, strict=True)
        for hidden_D, target_D in list(zip(hidden_TD, target_TD, strict=True))[1:]
    ]
    return sum(errors) / len(errors)


def made(recipe: Recipe, first: int = 1, stop: int = NUM_LAYERS) -> tuple[Decoder, Body]:
    decoder, _ = decoder_and_body()
    return decoder, make_domain_body(decoder, first, stop, recipe, MIDDLE, hidden())


# -- the middle and what is asked for ----------------------------------------------------------------------------------


def test_the_middle_stops_before_its_end() -> None:
    assert [layer for layer in range(-1, 7) if layer in MIDDLE] == [1, 2, 3] == list(MIDDLE.layers())
    assert not any(layer in Middle(2, 2) for layer in range(6))


@pytest.mark.parametrize("keep", [None, 6, 5, 4, (0, 1, 2, 3, 4, 5), (0, 2, 4, 5), (5, 4, 2, 0), [0, 3, 4, 5]])
def test_recipes_that_fit(keep: object) -> None:
    check_recipe(settings(keep), MIDDLE, NUM_LAYERS)


@pytest.mark.parametrize("keep", [None, 6, ALL])
def test_everything_can_be_kept_where_there_is_no_middle(keep: object) -> None:
    check_recipe(settings(keep), Middle(3, 3), NUM_LAYERS)


WHERE = "only the middle, layers 1 to 3 of 6, may lose any"


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (3, f"domain.keep_layers is 3 but {WHERE}; use 4 to 6, or null for all"),
        (7, f"domain.keep_layers is 7 but {WHERE}; use 4 to 6, or null for all"),
        (0, f"domain.keep_layers is 0 but {WHERE}"),
        (-2, f"domain.keep_layers is -2 but {WHERE}"),
        ((1, 2, 3, 4, 5), f"it drops layers \\[0\\] but {WHERE}; correct the list"),
        ((0, 1, 2), f"domain.keep_layers is \\[0, 1, 2\\] but it drops layers \\[4, 5\\] but {WHERE}"),
        ((0, 1, 2, 3, 4, 5, 6), f"it names unknown layers \\[6\\] but {WHERE}"),
        ((-1, 0, 1, 4, 5), "it names unknown layers \\[-1\\]"),
        ((), "it drops layers \\[0, 4, 5\\]"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(keep: object, message: str) -> None:
    with pytest.raises(CutError, match=message):
        check_recipe(settings(keep), MIDDLE, NUM_LAYERS)


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_layer_that_changes_nothing_is_the_first_to_go(lost: int) -> None:
    _, body = decoder_and_body(lost)
    recipe = choose_recipe(settings(5), MIDDLE, body, hidden())
    assert recipe == Recipe(tuple(i for i in ALL if i != lost), ())


@pytest.mark.parametrize("lost", [(1, 2), (1, 3), (2, 3)])
def test_of_two_layers_that_change_nothing_both_go(lost: tuple[int, int]) -> None:
    _, body = decoder_and_body(*lost)
    assert choose_recipe(settings(4), MIDDLE, body, hidden()).kept == tuple(i for i in ALL if i not in lost)


def test_the_layer_goes_without_which_the_suffixs_input_changes_least() -> None:
    _, body = decoder_and_body()
    for layer, strength in ((1, 0.4), (2, 1.0), (3, 0.2)):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            body.get_parameter(f"layers.{layer}.{name}.weight").mul_(strength)
    target_BTD = body.run(hidden(), 1, 4)
    errors = {}
    for lost in MIDDLE.layers():
        output_BTD = hidden()
        for layer in MIDDLE.layers():
            if layer != lost:
                output_BTD = body.run(output_BTD, layer, layer + 1)
        errors[lost] = difference(output_BTD, target_BTD)
    assert set(ALL) - set(choose_recipe(settings(5), MIDDLE, body, hidden()).kept) == {
        min(errors, key=lambda i: errors[i])
    }


def test_a_layer_outside_of_the_middle_never_goes() -> None:
    _, body = decoder_and_body(4, 5)
    assert {4, 5} < set(choose_recipe(settings(4), MIDDLE, body, hidden()).kept)


@pytest.mark.parametrize(("keep", "kept"), [(None, ALL), (6, ALL), ((5, 0, 4, 2), (0, 2, 4, 5)), (ALL, ALL)])
def test_by_hand_or_all(keep: object, kept: tuple[int, ...]) -> None:
    _, body = decoder_and_body()
    assert choose_recipe(settings(keep), MIDDLE, body, hidden()) == Recipe(kept, ())
    assert choose_recipe(settings(keep, "int8"), MIDDLE, body, hidden()).int8 == tuple(i for i in kept if i in MIDDLE)


def test_choosing_changes_no_weight_and_no_activation() -> None:
    _, body = decoder_and_body()
    before, hidden_BTD = copy.deepcopy(body.state_dict()), hidden()
    choose_recipe(settings(4, "int8"), MIDDLE, body, hidden_BTD)
    assert all(torch.equal(tensor, before[name]) for name, tensor in body.state_dict().items())
    assert torch.equal(hidden_BTD, hidden())


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [(), (1, 3), (1, 2, 3)])
def test_outside_of_the_middle_layers_are_the_foundation_models_inside_copies(int8: tuple[int, ...]) -> None:
    decoder, body = made(Recipe(ALL, int8))
    assert body.indices == [1, 2, 3, 4, 5]
    for index in body.indices:
        layer, original = body.layers[str(index)], decoder.layers[index]
        assert (layer is original) == (index not in MIDDLE)
        shared = {id(p) for p in layer.parameters()} & {id(p) for p in original.parameters()}
        assert bool(shared) == (index not in MIDDLE)
        is_int8 = {type(module) is Int8Linear for module in layer.modules() if isinstance(module, nn.Linear)}
        assert is_int8 == {index in int8}


def test_a_body_that_keeps_everything_gives_what_the_foundation_model_gives() -> None:
    decoder, body = made(Recipe(ALL, ()))
    assert torch.equal(body(hidden()), cut_decoder(decoder, CutLayers(1, 0))[1](hidden()))


def test_a_body_that_lost_a_layer_runs_the_others() -> None:
    decoder, body = made(Recipe((0, 1, 3, 4, 5), ()))
    whole = cut_decoder(decoder, CutLayers(1, 0))[1]
    assert torch.equal(body(hidden()), whole.run(whole.run(hidden(), 1, 2), 3))


@pytest.mark.parametrize(("first", "stop", "indices"), [(0, 6, [0, 1, 3, 4, 5]), (1, 5, [1, 3, 4]), (2, 6, [3, 4, 5])])
def test_a_body_holds_what_lies_between_its_cuts(first: int, stop: int, indices: list[int]) -> None:
    decoder, _ = decoder_and_body()
    middle = Middle(first, 4)
    before_BTD = cut_decoder(decoder, CutLayers(0, 0))[1].run(hidden(), 0, first)
    body = make_domain_body(decoder, first, stop, Recipe((0, 1, 3, 4, 5), (3,)), middle, before_BTD)
    assert body.indices == indices


def test_int8_is_close_to_the_foundation_model_and_leaves_it_as_it_was() -> None:
    decoder, whole = decoder_and_body()
    before = {i: copy.deepcopy(decoder.layers[i].state_dict()) for i in ALL}
    expected = whole.run(hidden(), 1, 4)
    body = make_domain_body(decoder, 1, NUM_LAYERS, Recipe(ALL, (1, 2, 3)), MIDDLE, hidden())
    assert 0.0 < difference(body.run(hidden(), 1, 4), expected) < 0.01
    assert torch.equal(whole.run(hidden(), 1, 4), expected)
    for i in ALL:
        after = decoder.layers[i].state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before[i].items())


def test_int8_is_calibrated_on_what_it_will_see() -> None:
    """Where some input channels are large, knowing them must help."""
    decoder, whole = decoder_and_body()
    for i in (1, 2, 3):
        decoder.layers[i].get_parameter("input_layernorm.weight")[::7] = 30.0
    blind = copy.deepcopy(whole)
    for i in (1, 2, 3):
        to_int8(blind.layers[str(i)], {})
    body = make_domain_body(decoder, 1, NUM_LAYERS, Recipe(ALL, (1, 2, 3)), MIDDLE, hidden())
    expected = whole.run(hidden(), 1, 4)
    calibrated, uncalibrated = (difference(one.run(hidden(), 1, 4), expected) for one in (body, blind))
    assert calibrated < 0.7 * uncalibrated


def test_a_body_is_frozen() -> None:
    _, body = made(Recipe(ALL, (1,)))
    assert not body.training and not any(p.requires_grad for p in body.parameters())


# -- counting ----------------------------------------------------------------------------------------------------------


def test_parameters_are_counted_once_and_in_any_precision() -> None:
    tied, untied = tiny_model(tied=True), tiny_model(tied=False)
    assert num_parameters(untied) == sum(p.numel() for p in untied.parameters())
    assert num_parameters(untied) - num_parameters(tied) == 300 * 32
    assert num_parameters(tied, tied.get_input_embeddings(), tied.get_output_embeddings()) == num_parameters(tied)
    linear = nn.Linear(5, 3)
    assert num_parameters(linear) == num_parameters(Int8Linear.from_linear(linear)) == 5 * 3 + 3
    assert num_parameters() == 0
