"""Adapters beside the layers of a cut body: what they do, what they leave alone, and the way out to plain peft."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from gaisnet.adapters.state import AdapterTensors, check_same_shapes, put_in, save_adapter, save_for_peft, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, active_adapters, add_adapter, has_adapter, trainable
from gaisnet.errors import AdapterMismatch, OutputNotWritable
from gaisnet.models.families import Decoder
from gaisnet.models.int8 import to_int8
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from tests.disk import largest_file
from tests.tiny import VOCAB, tiny_model

pytestmark = pytest.mark.numeric

CUT = CutLayers(1, 1)
TARGETS = ("q_proj", "v_proj", "down_proj")
SPEC = LoraSpec(rank=2, alpha=6, targets=TARGETS, layers=(3, 4))
INT8_LAYERS = (3,)  # so that one of the adapter's layers is in int8 and the other is not


def body_of(int8: bool = False, cut: CutLayers = CUT) -> Body:
    """A body out of a model whose weights are large enough to make every difference visible."""
    _, body, _ = cut_decoder(Decoder(tiny_model(initializer_range=0.2)), cut)
    for index in INT8_LAYERS if int8 else ():
        to_int8(body.layers[str(index)], {})
    return body.requires_grad_(False)


def hidden() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


def random_like(tensors: AdapterTensors, seed: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tensor.shape, generator=generator) * 0.3 for key, tensor in tensors.items()}


def with_adapter(body: Body, name: str, seed: int, spec: LoraSpec = SPEC) -> AdapterTensors:
    """Put an adapter with random factors on ``body``; it stays inactive."""
    add_adapter(body, name, spec, seed=0)
    tensors = random_like(take_out(body, name), seed)
    put_in(body, name, tensors)
    return tensors


def by_hand(body: Body, adapters: list[AdapterTensors], spec: LoraSpec = SPEC) -> Body:
    """A copy of ``body`` without adapters, each adapted layer's output changed as the paper says: W x + a/r B A x."""
    changed = copy.deepcopy(body)
    for path, module in changed.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        factors = [
            (t[f"{path}.lora_A.weight"], t[f"{path}.lora_B.weight"]) for t in adapters if f"{path}.lora_A.weight" in t
        ]

        def add(
            _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, factors: list[tuple[Tensor, Tensor]] = factors
        ) -> Tensor:
            return output + sum(
                (inputs[0] @ (b @ a).t() * (spec.alpha / spec.rank) for a, b in factors), torch.tensor(0.0)
            )

        module.register_forward_hook(add)
    return changed


def state_of(body: Body) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in body.state_dict().items()}


def same_state(body: Body, before: dict[str, Tensor]) -> bool:
    after = body.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in after)


# -- what an adapter does ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
def test_an_active_adapter_adds_its_product(int8: bool) -> None:
    body = body_of(int8)
    bare = copy.deepcopy(body)
    tensors = with_adapter(body, "domain", seed=1)
    activate(body, ("domain",))
    expected = by_hand(bare, [tensors])(hidden())
    assert (expected - bare(hidden())).abs().max() > 0.1
    torch.testing.assert_close(body(hidden()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_an_inactive_adapter_changes_nothing(int8: bool) -> None:
    body = body_of(int8)
    base = body(hidden())
    with_adapter(body, "domain", seed=1)
    assert active_adapters(body) == [] and torch.equal(body(hidden()), base)
    activate(body, ("domain",))
    assert not torch.equal(body(hidden()), base)
    activate(body, ())
    assert torch.equal(body(hidden()), base)


def test_a_new_adapter_changes_nothing_even_when_active() -> None:
    body = body_of()
    base = body(hidden())
    add_adapter(body, "domain", SPEC, seed=0)
    activate(body, ("domain",))
    assert torch.equal(body(hidden()), base)
    tensors = take_out(body, "domain")
    assert all(bool(t.any()) == (".lora_A." in key) for key, t in tensors.items())


@pytest.mark.parametrize("int8", [False, True])
def test_active_adapters_add_up(int8: bool) -> None:
    body = body_of(int8)
    bare = copy.deepcopy(body)
    first, second = with_adapter(body, "relay", seed=1), with_adapter(body, "domain", seed=2)
    for names, adapters in ((("relay", "domain"), [first, second]), (("relay",), [first]), (("domain",), [second])):
        activate(body, names)
        assert active_adapters(body) == sorted(names)
        torch.testing.assert_close(body(hidden()), by_hand(bare, adapters)(hidden()), atol=1e-5, rtol=1e-5)


def test_adapters_on_different_layers_are_switched_one_by_one() -> None:
    body = body_of()
    bare = copy.deepcopy(body)
    early = LoraSpec(2, 6, TARGETS, (1, 2))
    relay = with_adapter(body, "relay", 1, early)
    domain = with_adapter(body, "domain", 2)
    activate(body, ("relay", "domain"))
    torch.testing.assert_close(body(hidden()), by_hand(bare, [relay, domain])(hidden()), atol=1e-5, rtol=1e-5)
    activate(body, ("domain",))
    torch.testing.assert_close(body(hidden()), by_hand(bare, [domain])(hidden()), atol=1e-5, rtol=1e-5)


def test_adding_another_adapter_leaves_those_active_that_were() -> None:
    body = body_of()
    with_adapter(body, "relay", seed=1)
    activate(body, ("relay",))
    before = body(hidden())
    with_adapter(body, "domain", seed=2)
    assert active_adapters(body) == ["relay"]
    assert torch.equal(body(hidden()), before)
    assert has_adapter(body, "relay") and has_adapter(body, "domain") and not has_adapter(body, "merged")


@pytest.mark.parametrize("name", ["medical", "law-office_2", "train", "type", "base_layer", "q_proj", "mlp", "lora_A"])
def test_any_name_that_a_domain_may_have_is_an_adapters_name(name: str) -> None:
    body = body_of()
    weights = sum(p.numel() for p in body.parameters())
    base = body(hidden())
    tensors = with_adapter(body, name, seed=1)
    assert len(tensors) == 2 * len(TARGETS) * 2
    assert all(torch.equal(found, tensors[key]) for key, found in take_out(body, name).items())
    assert sum(p.numel() for p in body.parameters()) == weights + sum(t.numel() for t in tensors.values())
    assert sum(p.numel() for p in trainable(body, name)) == sum(t.numel() for t in tensors.values())
    assert torch.equal(body(hidden()), base)
    activate(body, (name,))
    assert active_adapters(body) == [name] and not torch.equal(body(hidden()), base)


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
def test_only_the_chosen_adapter_learns(int8: bool) -> None:
    body = body_of(int8)
    with_adapter(body, "relay", seed=1)
    with_adapter(body, "domain", seed=2)
    activate(body, ("relay", "domain"))
    for name in ("domain", "relay"):
        chosen = trainable(body, name)
        assert [p.shape for p in chosen] == [t.shape for t in take_out(body, name).values()]
        body.zero_grad()
        body(hidden()).square().mean().backward()
        learning = {path for path, p in body.named_parameters() if p.grad is not None and bool(p.grad.any())}
        assert len(learning) == len(chosen) and all("lora_" in path and name in path for path in learning)


def test_parameters_come_in_the_order_of_the_tensors() -> None:
    bodies = body_of(), body_of(int8=True)
    for body in bodies:
        tensors = with_adapter(body, "domain", seed=3)
        assert all(torch.equal(p, t) for p, t in zip(trainable(body, "domain"), tensors.values(), strict=True))


def test_activating_freezes() -> None:
    body = body_of()
    with_adapter(body, "domain", seed=1)
    trainable(body, "domain")
    activate(body, ("domain",))
    assert not any(p.requires_grad for p in body.parameters())


# -- out and in --------------------------------------------------------------------------------------------------------


def test_tensors_are_named_by_the_layers_of_the_foundation_model() -> None:
    body = body_of(cut=CutLayers(2, 0))
    add_adapter(body, "domain", LoraSpec(3, 6, ("q_proj",), (4,)), seed=0)
    shapes = {key: tuple(tensor.shape) for key, tensor in take_out(body, "domain").items()}
    assert shapes == {
        "layers.4.self_attn.q_proj.lora_A.weight": (3, 32),
        "layers.4.self_attn.q_proj.lora_B.weight": (32, 3),
    }


def test_what_is_taken_out_is_a_copy() -> None:
    body = body_of()
    with_adapter(body, "domain", seed=1)
    taken = take_out(body, "domain")
    expected = {key: tensor.clone() for key, tensor in taken.items()}
    for tensor in taken.values():
        assert not tensor.requires_grad
        tensor.zero_()
    assert all(torch.equal(found, expected[key]) for key, found in take_out(body, "domain").items())
    put_in(body, "domain", taken)
    for tensor in taken.values():
        tensor.fill_(9.0)
    assert not any(bool(tensor.any()) for tensor in take_out(body, "domain").values())


@pytest.mark.parametrize("int8", [False, True])
def test_an_adapter_moves_between_bodies_with_different_cuts(int8: bool) -> None:
    here, there = body_of(cut=CutLayers(1, 1)), body_of(int8, CutLayers(3, 1))
    tensors = with_adapter(here, "domain", seed=1)
    add_adapter(there, "medical", SPEC, seed=9)
    put_in(there, "medical", tensors)
    activate(here, ("domain",))
    activate(there, ("medical",))
    expected = here.run(hidden(), 3)
    assert (there(hidden()) - expected).norm() / expected.norm() < (0.1 if int8 else 1e-6)


def test_putting_one_in_leaves_all_others_and_the_weights() -> None:
    body = body_of()
    with_adapter(body, "relay", seed=1)
    add_adapter(body, "domain", SPEC, seed=0)
    before = state_of(body)
    put_in(body, "domain", random_like(take_out(body, "domain"), seed=5))
    changed = {name for name, tensor in body.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == 12 and all("lora_" in name and "domain" in name for name in changed)


def test_a_seed_gives_the_same_adapter_whatever_was_before() -> None:
    def tensors(seed: int, noise: int, others: tuple[str, ...] = ()) -> AdapterTensors:
        body = body_of()
        for other in others:
            add_adapter(body, other, SPEC, seed=77)
        torch.manual_seed(noise)
        add_adapter(body, "domain", SPEC, seed=seed)
        return take_out(body, "domain")

    first, again, other = tensors(1, 5), tensors(1, 6, ("relay",)), tensors(2, 5)
    assert all(torch.equal(again[key], tensor) for key, tensor in first.items())
    assert all(torch.equal(other[key], tensor) == (".lora_B." in key) for key, tensor in first.items())


def test_adding_does_not_disturb_the_global_generator() -> None:
    body = body_of()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    add_adapter(body, "domain", SPEC, seed=1)
    assert torch.equal(torch.rand(4), expected)


# -- what does not fit -------------------------------------------------------------------------------------------------

KEY = "layers.4.mlp.down_proj.lora_A.weight"


def lacking(tensors: AdapterTensors) -> AdapterTensors:
    return {key: tensor for key, tensor in tensors.items() if key != KEY}


def misshapen(tensors: AdapterTensors) -> AdapterTensors:
    return {**tensors, KEY: torch.zeros(3, 48)}


def with_number(tensors: AdapterTensors, number: float) -> AdapterTensors:
    spoilt = tensors[KEY].clone()
    spoilt[1, 7] = number
    return {**tensors, KEY: spoilt}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lacking, f"adapter 'domain': expected 12 tensors, found 11, different from '{KEY}' on"),
        (
            lambda t: {**t, "layers.5.x": torch.zeros(1)},
            "expected 12 tensors, found 13, different from 'layers.5.x' on",
        ),
        (lambda t: {}, "found 0"),
        (misshapen, f"'{KEY}' of shape \\(2, 48\\), found \\(3, 48\\)"),
        (lambda t: {**t, KEY: t[KEY].t()}, "found \\(48, 2\\)"),
        (lambda t: with_number(t, float("nan")), f"finite numbers in '{KEY}', found NaN or infinity"),
        (lambda t: with_number(t, float("-inf")), "finite numbers"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_changes(spoil: object, message: str) -> None:
    assert callable(spoil)
    body = body_of()
    with_adapter(body, "domain", seed=1)
    before = state_of(body)
    fresh = random_like(take_out(body, "domain"), seed=2)
    with pytest.raises(AdapterMismatch, match=message):
        put_in(body, "domain", spoil(fresh))
    assert same_state(body, before)
    put_in(body, "domain", fresh)


def test_no_adapter_of_that_name() -> None:
    body = body_of()
    tensors = with_adapter(body, "domain", seed=1)
    before = state_of(body)
    with pytest.raises(
        AdapterMismatch, match="adapter 'relay': expected an adapter of this name on the body, found none"
    ):
        take_out(body, "relay")
    with pytest.raises(AdapterMismatch, match="adapter 'relay': expected 0 tensors, found 12"):
        put_in(body, "relay", tensors)
    assert same_state(body, before)


@pytest.mark.parametrize("spec", [LoraSpec(2, 4, ("c_attn",), (3, 4)), LoraSpec(2, 4, ("q_proj",), (0,))])
def test_an_adapter_without_a_target_is_refused_before_anything_changes(spec: LoraSpec) -> None:
    body = body_of()
    with_adapter(body, "domain", seed=1)
    activate(body, ("domain",))
    before = state_of(body)
    with pytest.raises(AdapterMismatch, match=f"adapter 'odd': expected linear modules named {spec.targets[0]}"):
        add_adapter(body, "odd", spec, seed=0)
    assert same_state(body, before) and active_adapters(body) == ["domain"] and not has_adapter(body, "odd")
    add_adapter(body, "odd", SPEC, seed=0)
    assert has_adapter(body, "odd")


def test_adapters_of_one_shape_pass() -> None:
    body = body_of()
    tensors = with_adapter(body, "domain", seed=1)
    check_same_shapes("domain", tensors, random_like(tensors, seed=2))


# -- out to peft -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False), ("mistral", True)]
)
@pytest.mark.parametrize("cut", [CutLayers(0, 0), CutLayers(3, 1)])
def test_plain_peft_loads_it_on_the_unsplit_model(tmp_path: Path, family: str, tied: bool, cut: CutLayers) -> None:
    head, body, tail = cut_decoder(Decoder(tiny_model(family, tied, initializer_range=0.2)), cut)
    tensors = with_adapter(body, "medical", seed=4)
    activate(body, ("medical",))
    save_for_peft(tmp_path / "medical", SPEC, tensors, "tiny")
    peft_model = PeftModel.from_pretrained(
        tiny_model(family, tied, initializer_range=0.2), str(tmp_path / "medical")
    ).eval()
    ids_BT = torch.randint(VOCAB, (3, 11), generator=torch.Generator().manual_seed(7))
    expected = peft_model(ids_BT).logits
    assert (expected - tiny_model(family, tied, initializer_range=0.2)(ids_BT).logits).abs().max() > 0.1
    torch.testing.assert_close(tail(body(head(ids_BT))), expected, atol=1e-5, rtol=1e-5)


def test_what_is_written_for_peft(tmp_path: Path) -> None:
    body = body_of()
    tensors = with_adapter(body, "medical", seed=4)
    save_for_peft(tmp_path / "deep" / "medical", SPEC, tensors, "org/model")
    assert sorted(p.name for p in (tmp_path / "deep" / "medical").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "deep" / "medical" / "adapter_config.json").read_text(encoding="utf-8"))
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "bias": "none"}
    assert expected.items() <= config.items()
    assert config["base_model_name_or_path"] == "org/model" and config["inference_mode"] is True
    assert sorted(config["target_modules"]) == sorted(TARGETS) and config["layers_to_transform"] == [3, 4]


@pytest.mark.parametrize("room", [0, 300, 1500], ids="{} bytes".format)
def test_a_full_disk_leaves_an_adapter_absent_or_as_it_was(tmp_path: Path, room: int) -> None:
    """Its configuration alone, or half of its tensors, would be loaded by nobody and looked for by all."""
    body, folder = body_of(), tmp_path / "adapters" / "medical"
    tensors = with_adapter(body, "medical", seed=4)
    with largest_file(room), pytest.raises(OutputNotWritable, match="medical': .*; free some space"):
        save_adapter(folder, SPEC, tensors, "tiny", "model.layers")
    assert list(folder.parent.iterdir()) == []
    save_adapter(folder, SPEC, tensors, "tiny", "model.layers")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with largest_file(room), pytest.raises(OutputNotWritable):
        save_adapter(folder, SPEC, random_like(tensors, seed=5), "tiny", "model.layers")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["medical"]


def test_saving_again_replaces(tmp_path: Path) -> None:
    body = body_of()
    tensors = with_adapter(body, "medical", seed=4)
    save_for_peft(tmp_path, SPEC, tensors, "tiny")
    later = random_like(tensors, seed=5)
    save_for_peft(tmp_path, SPEC, later, "tiny")
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    loaded = {name: p for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    assert len(loaded) == len(later)
    for key, tensor in later.items():
        assert torch.equal(loaded[f"base_model.model.model.{key.replace('.weight', '.default.weight')}"], tensor)
