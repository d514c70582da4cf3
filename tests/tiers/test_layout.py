"""Layouts: layers of the tiers, configurations that do not fit, defaults of a family."""

from typing import Any

import pytest

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config.file import parse_config
from gaisnet.errors import CutError
from gaisnet.models.families import BERT, LLAMA
from gaisnet.models.parts import CutLayers
from gaisnet.models.recipe import Middle
from gaisnet.tiers.split.layout import Layout, with_family_defaults
from tests.tiny import NUM_LAYERS, encoder_raw_config, tiny_config, tiny_edge


def layout(
    heads: tuple[int, ...] = (1, 2), first_layer: int = 4, num_layers: int = NUM_LAYERS, **changes: Any
) -> Layout:
    devices = [{"name": f"device-{i}", "head_layers": head} for i, head in enumerate(heads)]
    raw = {
        "edges": [{"name": "edge", "domain": "facts", "devices": devices}],
        "adapters": {"rank": 2, "alpha": 6, "first_layer": first_layer, "targets": ["q_proj"]},
        "domain": {},
        **changes,
    }
    return Layout(tiny_config(**raw), num_layers)


def test_bodies_begin_at_the_shallowest_head_and_recipes_at_the_deepest() -> None:
    found = layout((2, 1, 3), tail_layers=1)
    assert (found.first_cut, found.last_cut) == (1, 3)
    assert (found.first_adapted, found.tail_start) == (4, 5)
    assert found.middle == Middle(3, 4)


def test_devices_of_all_edges_count() -> None:
    edges = [
        {"name": f"edge-{i}", "domain": f"domain-{i}", "devices": [{"name": f"device-{i}", "head_layers": head}]}
        for i, head in enumerate((3, 0))
    ]
    found = Layout(tiny_config(edges=edges, domain={}), NUM_LAYERS)
    assert (found.first_cut, found.last_cut) == (0, 3)


def test_what_a_device_holds() -> None:
    found = layout((2, 1), tail_layers=1)
    assert [found.device_cut(device) for _, device in found.config.each_device()] == [CutLayers(2, 1), CutLayers(1, 1)]


def test_a_domain_adapter_sits_on_the_layers_that_all_bodies_share() -> None:
    assert layout().domain_spec() == LoraSpec(2, 6, ("q_proj",), (4, 5))
    assert layout(first_layer=3, tail_layers=2).domain_spec() == LoraSpec(2, 6, ("q_proj",), (3,))


def test_merged_adapters_keep_their_scale() -> None:
    found = layout().domain_spec(3)
    assert found == LoraSpec(6, 18, ("q_proj",), (4, 5))
    assert found.alpha / found.rank == 6 / 2


def test_a_relay_sits_beside_the_gaps_of_the_middle_or_on_all_of_it() -> None:
    found = layout(relay={"rank": 5})
    assert found.relay_spec((0, 1, 2, 3, 4, 5)) == LoraSpec(5, 5, ("down_proj",), (2, 3))
    assert found.relay_spec((0, 1, 3, 4, 5)).layers == (3,)
    assert found.relay_spec((1, 4, 5)).layers == ()
    deep = layout((1,), first_layer=12, num_layers=16)
    assert deep.relay_spec(tuple(i for i in range(16) if i not in (4, 5, 11))).layers == (3, 6, 7, 10)


@pytest.mark.parametrize(
    ("heads", "first_layer", "tail_layers"), [((0,), 1, 0), ((4,), 5, 0), ((3, 0), 4, 1), ((0,), 1, 4)]
)
def test_the_closest_fits(heads: tuple[int, ...], first_layer: int, tail_layers: int) -> None:
    layout(heads, first_layer, tail_layers=tail_layers)


@pytest.mark.parametrize(
    ("heads", "first_layer", "tail_layers", "message"),
    [
        ((1,), 6, 0, "adapters.first_layer is 6 but the model has 6 layers and the devices' tails take 0; use 1 to 5"),
        ((1,), 5, 1, "adapters.first_layer is 5 but the model has 6 layers and the devices' tails take 1; use 1 to 4"),
        (
            (4,),
            4,
            0,
            "head_layers of device 'device-0' is 4 but the model has 6 layers and adapters start at 4; use 0 to 3",
        ),
        ((1, 5), 3, 0, "head_layers of device 'device-1' is 5 but .*adapters start at 3; use 0 to 2"),
        ((0,), 1, 6, "tail_layers is 6 but the model has 6 layers; use 0 to 4"),
        ((0,), 1, 5, "tail_layers is 5 but the model has 6 layers; use 0 to 4"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    heads: tuple[int, ...], first_layer: int, tail_layers: int, message: str
) -> None:
    with pytest.raises(CutError, match=message):
        layout(heads, first_layer, tail_layers=tail_layers)


def test_a_recipe_is_checked_against_the_middle() -> None:
    layout(domain={"keep_layers": 5})
    with pytest.raises(CutError, match="domain.keep_layers is 4 but only the middle, layers 2 to 3 of 6, may lose any"):
        layout(domain={"keep_layers": 4})
    with pytest.raises(CutError, match=r"it drops layers \[1\] but only the middle"):
        layout(domain={"keep_layers": [0, 2, 3, 4, 5]})


def test_the_default_settings_fit_the_default_model() -> None:
    raw: dict[str, Any] = {"adapters": {}, "domain": {}, "relay": {}}
    assert Layout(tiny_config(**raw), 30).domain_spec().layers == tuple(range(18, 30))


# -- defaults of a family ----------------------------------------------------------------------------------------------


def test_defaults_that_do_not_suit_an_encoder_are_replaced() -> None:
    config = parse_config(encoder_raw_config(relay={"rank": 4}))
    assert config.relay.enabled and config.fine_tune.anchor_weight
    resolved = with_family_defaults(config, BERT)
    assert not resolved.relay.enabled and not resolved.fine_tune.anchor_weight
    changed = {"relay": {"enabled"}, "fine_tune": {"anchor_weight"}}
    assert resolved.model_dump(exclude=changed) == config.model_dump(exclude=changed)
    Layout(resolved, NUM_LAYERS, BERT)  # raises nothing


def test_logits_of_many_classes_are_not_written_in_int4_by_default() -> None:
    edges = [{**tiny_edge("north", "shapes"), "labels": [str(i) for i in range(32)]}]
    resolved = with_family_defaults(parse_config(encoder_raw_config(edges=edges, wire={"gradient": "int8"})), BERT)
    assert (resolved.wire.body_output, resolved.wire.gradient) == ("float16", "int8")
    Layout(resolved, NUM_LAYERS, BERT)


def test_settings_of_the_user_and_of_a_decoder_stay() -> None:
    raw = encoder_raw_config(relay={"enabled": True}, fine_tune={"anchor_weight": 1.0})
    assert with_family_defaults(parse_config(raw), BERT) == parse_config(raw)
    assert with_family_defaults(tiny_config(), LLAMA) == tiny_config()


def test_a_resolved_configuration_that_is_written_and_read_stays_the_same() -> None:
    resolved = with_family_defaults(parse_config(encoder_raw_config()), BERT)
    again = parse_config(resolved.model_dump(mode="json"))
    assert again == resolved == with_family_defaults(again, BERT)
