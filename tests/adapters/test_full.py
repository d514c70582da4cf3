"""All weights of a layer as an adapter: they stand in place of the model's own while it acts, and only then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from gaisnet.adapters.full import FullSpec
from gaisnet.adapters.state import put_in, save_adapter, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, active_adapters, add_adapter, has_adapter, trainable
from gaisnet.errors import AdapterMismatch
from gaisnet.models.encoders import EncoderBody
from gaisnet.models.families import ENCODERS
from gaisnet.models.frozen import freeze_linears, quick_products
from gaisnet.models.int8 import to_int8
from tests.adapters.test_prompts import LABELS, LATE, examples, logits, lora, parts
from tests.tiny import tiny_encoder
from tests.unsplit import UNSEEN, logits_of, with_lora

pytestmark = pytest.mark.numeric

FULL = FullSpec(LATE, num_classes=5)


def changed(
    body: EncoderBody, name: str, spec: FullSpec = FULL, by: float = 0.05, seed: int = 1
) -> dict[str, torch.Tensor]:
    """An adapter whose weights are near the model's own."""
    add_adapter(body, name, spec, seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: t + by * torch.randn(t.shape, generator=generator) for key, t in take_out(body, name).items()}
    put_in(body, name, tensors)
    return tensors


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_its_tensors_are_all_of_the_layers_named_as_in_the_model_and_begin_as_there(family: str) -> None:
    _, body = parts(family)
    model = tiny_encoder(family).get_submodule(ENCODERS[family].layers_path)
    add_adapter(body, "domain", FULL, seed=0)
    tensors = take_out(body, "domain")
    classifier = {name: tensors.pop(name) for name in ("classifier.weight", "classifier.bias")}
    assert classifier["classifier.weight"].shape == (5, 32)
    expected = {f"layers.{key}": t for key, t in model.state_dict().items() if int(key.partition(".")[0]) in LATE}
    assert tensors.keys() == expected.keys() and len(expected) == 16 * len(LATE)
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_without_an_adapter_that_acts_the_model_is_as_it_was_to_the_bit(family: str) -> None:
    head, body = parts(family)
    freeze_linears(*body.layers.values())
    before, own = logits(head, body, family), {name: p for name, p in body.named_parameters()}
    changed(body, "one")
    changed(body, "two", by=0.1, seed=2)
    assert torch.equal(logits(head, body, family), before) and active_adapters(body) == []
    found = {}
    for name in ("one", "two"):
        activate(body, [name])
        assert active_adapters(body) == [name] and has_adapter(body, name)
        found[name] = logits(head, body, family)
    assert (found["one"] - found["two"]).abs().max() > 1e-2
    activate(body, [])
    assert torch.equal(logits(head, body, family), before)
    assert all(body.get_parameter(name) is parameter for name, parameter in own.items() if "classifier" not in name)


def test_an_adapter_that_is_added_while_another_acts_begins_as_the_models_own() -> None:
    _, body = parts("vit")
    changed(body, "one")
    activate(body, ["one"])
    add_adapter(body, "two", FULL, seed=0)
    model = tiny_encoder("vit").state_dict()
    assert torch.equal(take_out(body, "two")["layers.4.mlp.fc1.weight"], model["vit.layers.4.mlp.fc1.weight"])
    assert active_adapters(body) == ["one"]


def test_a_step_changes_the_adapter_and_neither_the_model_nor_another_adapter() -> None:
    head, body = parts("vit")
    freeze_linears(*body.layers.values())
    before = logits(head, body, "vit")
    other = changed(body, "other", seed=2)
    start = changed(body, "domain")
    activate(body, ["domain"])
    parameters = trainable(body, "domain")
    assert len(parameters) == len(start)
    with quick_products(*body.layers.values()):
        F.cross_entropy(logits(head, body, "vit"), LABELS).backward()
        torch.optim.AdamW(parameters, lr=0.01).step()
    after = take_out(body, "domain")
    assert all((after[key] - start[key]).abs().max() > 5e-3 for key in start if not key.endswith(UNSEEN))
    activate(body, [])
    assert torch.equal(logits(head, body, "vit"), before)
    assert all(torch.equal(tensor, other[key]) for key, tensor in take_out(body, "other").items())


def test_memory_is_one_copy_of_the_adapted_layers() -> None:
    _, body = parts("vit")
    one_layer = sum(p.numel() for p in body.layers["4"].parameters())
    count = sum(p.numel() for p in body.parameters())
    add_adapter(body, "domain", FullSpec((4,)), seed=0)
    for names in ([], ["domain"]):
        activate(body, names)
        assert sum(p.numel() for p in body.parameters()) == count + one_layer


def test_a_lora_acts_on_weights_in_place() -> None:
    """Whichever was there first."""
    spec, found = lora("vit", num_classes=0), []
    for order in (["full", "lora"], ["lora", "full"]):
        head, body = parts("vit")
        generator = torch.Generator().manual_seed(3)
        tensors = {}
        for name in order:
            if name == "full":
                tensors[name] = changed(body, name)
            else:
                add_adapter(body, name, spec, seed=0)
        factors = {k: 0.1 * torch.randn(t.shape, generator=generator) for k, t in take_out(body, "lora").items()}
        put_in(body, "lora", factors)
        assert tensors["full"].keys() == take_out(body, "full").keys()
        activate(body, ["full", "lora"])
        found.append(logits(head, body, "vit"))
    torch.testing.assert_close(*found)
    model = tiny_encoder("vit", num_classes=5)
    model.load_state_dict({k.replace("layers.", "vit.layers.", 1): t for k, t in tensors["full"].items()}, strict=False)
    classifier = {key: t for key, t in tensors["full"].items() if key.startswith("classifier.")}
    whole, _ = with_lora(model, LoraSpec(spec.rank, spec.alpha, spec.targets, spec.layers, 5), factors | classifier)
    torch.testing.assert_close(found[0], whole(*examples("vit")), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_what_is_written_loads_into_the_model(tmp_path: Path, family: str) -> None:
    head, body = parts(family)
    tensors = changed(body, "domain")
    activate(body, ["domain"])
    save_adapter(tmp_path / "full", FULL, tensors, "tiny", ENCODERS[family].layers_path)
    model = tiny_encoder(family, num_classes=5)
    _, unexpected = model.load_state_dict(load_file(tmp_path / "full" / "model.safetensors"), strict=False)
    assert unexpected == []
    torch.testing.assert_close(logits(head, body, family), logits_of(model)(*examples(family)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("spec", "found"),
    [(FullSpec((0, 3)), "it lacks \\[0\\]"), (FullSpec(()), "found none"), (FullSpec((3, 4)), "some in int8")],
)
def test_an_adapter_without_a_place_is_refused_before_anything_changes(spec: FullSpec, found: str) -> None:
    _, body = parts("vit")
    to_int8(body.layers["4"], {})
    before = set(body.state_dict())
    with pytest.raises(AdapterMismatch, match=f"adapter 'odd': expected .*{found}"):
        add_adapter(body, "odd", spec, seed=0)
    assert set(body.state_dict()) == before and not has_adapter(body, "odd")


def test_two_do_not_act_together() -> None:
    _, body = parts("vit")
    for name in ("one", "two"):
        add_adapter(body, name, FullSpec(LATE), seed=0)
    activate(body, ["one"])
    with pytest.raises(AdapterMismatch, match="'one': expected to be the only one with weights of a layer, found 2"):
        activate(body, ["one", "two"])
    assert active_adapters(body) == ["one"]
