"""Deep prompts and classifiers on a cut encoder equal the model in one piece: outputs, gradients, a step of AdamW."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.state import AdapterTensors, put_in, save_for_peft, save_prompts, take_out
from gaisnet.adapters.tuning import (
    AdapterSpec,
    LoraSpec,
    activate,
    active_adapters,
    add_adapter,
    has_adapter,
    parameters_of,
    trainable,
)
from gaisnet.errors import AdapterMismatch
from gaisnet.models.attention import let_attention_be_replaced
from gaisnet.models.encoders import EncoderBody, EncoderHead, cut_encoder, first_rows
from gaisnet.models.families import ENCODERS, Decoder, Encoder
from gaisnet.models.int8 import to_int8
from gaisnet.models.packing import Packing
from gaisnet.models.parts import CutLayers, cut_decoder
from tests.tiny import tiny_encoder, tiny_inputs, tiny_model
from tests.unsplit import assert_same_step, logits_of, unsplit, with_prompts

pytestmark = pytest.mark.numeric

LATE = (3, 4, 5)
PROMPTS = PromptSpec(num_rows=4, layers=LATE, num_classes=5)
CUTS = [CutLayers(0), CutLayers(1), CutLayers(3)]
LENGTHS = (3, 9, 6, 1)
LABELS = torch.tensor([4, 0, 1, 3])


def lora(family: str, layers: tuple[int, ...] = LATE, num_classes: int = 5) -> LoraSpec:
    return LoraSpec(2, 6, ENCODERS[family].targets, layers, num_classes)


def parts(family: str, at: CutLayers = CUTS[1]) -> tuple[EncoderHead, EncoderBody]:
    return cut_encoder(Encoder(tiny_encoder(family)), at)


def random_like(tensors: AdapterTensors, seed: int) -> AdapterTensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(tensor.shape, generator=generator) * (0.1 if ".lora_" in key else 0.5)
        for key, tensor in tensors.items()
    }


def with_adapter(body: EncoderBody, name: str, spec: AdapterSpec, seed: int = 1) -> AdapterTensors:
    add_adapter(body, name, spec, seed=0)
    tensors = random_like(take_out(body, name), seed)
    put_in(body, name, tensors)
    return tensors


def examples(family: str) -> tuple[Tensor, Tensor | None]:
    """Images, or texts of unequal lengths and what of them is real."""
    if family == "vit":
        return tiny_inputs("vit", 4), None
    ids = [tiny_inputs("bert", 1, n, seed)[0] for seed, n in enumerate(LENGTHS)]
    mask_BT = pad_sequence([torch.ones(n, dtype=torch.long) for n in LENGTHS], batch_first=True)
    return pad_sequence(ids, batch_first=True), mask_BT


def logits(head: EncoderHead, body: EncoderBody, family: str, packed: bool = False) -> Tensor:
    inputs, mask_BT = examples(family)
    hidden_BTD = head(inputs, mask_BT)
    if not packed:
        return body.classify(body.run(hidden_BTD, attention_mask_BT=mask_BT, pick=first_rows))
    lengths = LENGTHS if family == "bert" else (hidden_BTD.shape[1],) * len(hidden_BTD)
    packing = Packing(lengths, hidden_BTD.device)
    rows_1ND = packing.rows([rows[:n] for rows, n in zip(hidden_BTD, lengths, strict=True)])
    firsts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])
    return body.classify(body.run(rows_1ND, packing=packing, pick=lambda out_1ND: out_1ND[0, firsts]))


def learn(loss: Tensor, parameters: Sequence[torch.nn.Parameter]) -> list[Tensor | None]:
    loss.backward()
    torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1).step()
    return [parameter.grad for parameter in parameters]


# -- split equals unsplit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(ENCODERS))
@pytest.mark.parametrize("at", CUTS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "prompts"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_step_is_that_of_the_unsplit_model(family: str, at: CutLayers, kind: str, packed: bool) -> None:
    spec: AdapterSpec = lora(family) if kind == "lora" else PROMPTS
    head, body = parts(family, at)
    let_attention_be_replaced(body.layers)
    bare = logits(head, body, family)
    tensors = with_adapter(body, "domain", spec)
    whole, expected = unsplit(tiny_encoder(family), spec, tensors)
    activate(body, ["domain"])
    parameters = trainable(body, "domain")
    found_NC, expected_NC = logits(head, body, family, packed), whole(*examples(family))
    assert found_NC.shape == (4, 5) != bare.shape
    torch.testing.assert_close(found_NC, expected_NC, atol=1e-5, rtol=1e-4)

    gradients = learn(F.cross_entropy(found_NC, LABELS), parameters)
    theirs = dict(zip(expected, learn(F.cross_entropy(expected_NC, LABELS), list(expected.values())), strict=True))
    names = list(parameters_of(body, "domain"))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-3, msg=name)
    assert_same_step(take_out(body, "domain"), {n: p.detach() for n, p in expected.items()}, theirs)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_prompts_are_seen_in_every_layer_that_has_them_and_only_there(family: str) -> None:
    """An adapter with prompts in some layers, beside one with others in others: both are seen."""
    head, body = parts(family)
    some = with_adapter(body, "some", PromptSpec(2, (2, 4)))
    others = with_adapter(body, "others", PromptSpec(3, (3,), num_classes=3), seed=2)
    activate(body, ["some", "others"])
    whole, _ = with_prompts(tiny_encoder(family), {**some, **others})
    both = logits(head, body, family)
    torch.testing.assert_close(both, whole(*examples(family)), atol=1e-5, rtol=1e-4)
    activate(body, ["others"])
    assert (logits(head, body, family) - both).abs().max() > 1e-2


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_without_an_adapter_that_acts_the_model_is_as_it_was(family: str) -> None:
    head, body = parts(family)
    let_attention_be_replaced(body.layers)
    before = logits(head, body, family)
    with_adapter(body, "domain", PROMPTS)
    assert active_adapters(body) == [] and has_adapter(body, "domain")
    assert torch.equal(logits(head, body, family), before)
    activate(body, ["domain"])
    assert active_adapters(body) == ["domain"]
    activate(body, [])
    assert torch.equal(logits(head, body, family), before)


def test_prompts_beside_a_lora() -> None:
    """Keys and values of a prompt pass a LoRA, too, as those of the sequence do."""
    head, body = parts("vit")
    lora_tensors = with_adapter(body, "lora", lora("vit", num_classes=0))
    prompts = with_adapter(body, "prompts", PROMPTS, seed=2)
    activate(body, ["lora", "prompts"])
    changed = tiny_encoder("vit")
    layers = Encoder(changed).layers
    for name, a in lora_tensors.items():
        if ".lora_A." in name:
            path = name.removesuffix(".lora_A.weight").removeprefix("layers.")
            layers.get_submodule(path).weight.data += 3 * lora_tensors[name.replace("lora_A", "lora_B")] @ a  # type: ignore[operator]
    whole, _ = with_prompts(changed, prompts)
    torch.testing.assert_close(logits(head, body, "vit"), whole(*examples("vit")), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_gradients_pass_int8_layers_to_prompts(family: str) -> None:
    head, body = parts(family)
    exact_head, exact = parts(family)
    to_int8(body.layers["4"], {})
    found = []
    for one_head, one in ((head, body), (exact_head, exact)):
        with_adapter(one, "domain", PromptSpec(4, (4, 5), 3))
        activate(one, ["domain"])
        trainable(one, "domain")
        F.cross_entropy(logits(one_head, one, family), LABELS % 3).backward()
        grad = parameters_of(one, "domain")["layers.4.prompts.weight"].grad
        assert grad is not None
        found.append(grad)
    assert 0 < (found[0] - found[1]).norm() / found[1].norm() < 0.2


# -- what an adapter is ------------------------------------------------------------------------------------------------


def test_its_tensors() -> None:
    _, body = parts("bert")
    add_adapter(body, "domain", PROMPTS, seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in take_out(body, "domain").items()}
    assert shapes == {
        **{f"layers.{index}.prompts.weight": (4, 32) for index in LATE},
        "classifier.weight": (5, 32),
        "classifier.bias": (5,),
    }


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_a_lora_has_the_families_linear_modules_and_its_classifier(family: str) -> None:
    _, body = parts(family)
    add_adapter(body, "domain", lora(family), seed=0)
    tensors = take_out(body, "domain")
    adapted = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
    linear = {f"layers.{i}.{n}" for i in LATE for n, m in body.layers[str(i)].named_modules() if hasattr(m, "lora_A")}
    assert adapted == linear and len(adapted) == 6 * len(LATE)
    assert len(tensors) == 2 * len(adapted) + 2


@pytest.mark.parametrize("spec", [PROMPTS, lora("vit")])
def test_a_seed_gives_the_same_adapter_and_disturbs_nobody(spec: AdapterSpec) -> None:
    found = []
    torch.manual_seed(3)
    expected = torch.rand(4)
    for seed in (1, 1, 2):
        _, body = parts("vit")
        torch.manual_seed(3)
        add_adapter(body, "domain", spec, seed)
        assert torch.equal(torch.rand(4), expected)
        found.append(take_out(body, "domain"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["classifier.weight"], found[2]["classifier.weight"])


def test_only_the_adapter_learns() -> None:
    _, body = parts("vit")
    add_adapter(body, "other", PROMPTS, seed=0)
    add_adapter(body, "domain", PROMPTS, seed=0)
    learning = trainable(body, "domain")
    assert len(learning) == 5
    assert {id(p) for p in body.parameters() if p.requires_grad} == {id(p) for p in learning}
    activate(body, ["domain"])
    assert not any(p.requires_grad for p in learning)


# -- out to peft -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(ENCODERS))
@pytest.mark.parametrize("at", CUTS, ids=str)
def test_plain_peft_loads_a_lora_and_its_classifier_on_the_unsplit_model(
    tmp_path: Path, family: str, at: CutLayers
) -> None:
    head, body = parts(family, at)
    tensors = with_adapter(body, "domain", lora(family))
    activate(body, ["domain"])
    save_for_peft(tmp_path, lora(family), tensors, "tiny", ENCODERS[family].layers_path)
    model = PeftModel.from_pretrained(tiny_encoder(family, num_classes=5), str(tmp_path)).eval()
    torch.testing.assert_close(logits(head, body, family), logits_of(model)(*examples(family)), atol=1e-5, rtol=1e-4)
    loaded = load_file(tmp_path / "adapter_model.safetensors")
    assert len(loaded) == len(tensors) == 2 * 6 * len(LATE) + 2


def test_prompts_are_written_with_what_they_are_for(tmp_path: Path) -> None:
    _, body = parts("vit")
    tensors = with_adapter(body, "domain", PROMPTS)
    save_prompts(tmp_path / "deep" / "domain", PROMPTS, tensors, "org/model")
    with safe_open(tmp_path / "deep" / "domain" / "prompts.safetensors", "pt") as file:
        assert {"base_model": "org/model", "num_rows": "4", "layers": "(3, 4, 5)", "num_classes": "5"}.items() <= (
            file.metadata().items()
        )
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
        assert set(file.keys()) == set(tensors)


# -- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "found"),
    [
        (PromptSpec(4, (0, 3)), "it lacks \\[0\\]"),
        (PromptSpec(4, (3, 6)), "it lacks \\[6\\]"),
        (PromptSpec(4, ()), "found none"),
        (PromptSpec(0, (3,)), "layers of the body for 0 rows each"),
        (LoraSpec(2, 4, ("c_attn",), (3,), 3), "linear modules named c_attn"),
    ],
)
def test_an_adapter_without_a_place_is_refused_before_anything_changes(spec: AdapterSpec, found: str) -> None:
    _, body = parts("vit")
    before = set(body.state_dict())
    with pytest.raises(AdapterMismatch, match=f"adapter 'odd': expected .*{found}"):
        add_adapter(body, "odd", spec, seed=0)
    assert set(body.state_dict()) == before and not has_adapter(body, "odd")


@pytest.mark.parametrize("spec", [PromptSpec(4, (3,)), LoraSpec(2, 4, ("q_proj",), (3,), num_classes=2)])
def test_a_decoder_has_no_place_for_prompts_or_classes(spec: AdapterSpec) -> None:
    _, body, _ = cut_decoder(Decoder(tiny_model()), CutLayers(1))
    before = set(body.state_dict())
    with pytest.raises(AdapterMismatch, match="adapter 'odd': expected the body of an encoder"):
        add_adapter(body, "odd", spec, seed=0)
    assert set(body.state_dict()) == before


def test_two_classifiers_do_not_add_up() -> None:
    _, body = parts("vit")
    for name in ("one", "two"):
        add_adapter(body, name, PROMPTS, seed=0)
    activate(body, ["one"])
    with pytest.raises(AdapterMismatch, match="adapter 'one': expected to be the only one with a classifier, found 2"):
        activate(body, ["one", "two"])
    assert active_adapters(body) == ["one"]


def test_nothing_classifies_where_no_classifier_acts() -> None:
    _, body = parts("vit")
    body.classifier = None
    add_adapter(body, "domain", PROMPTS, seed=0)
    with pytest.raises(AdapterMismatch, match="of a classifier': expected one that acts"):
        body.classify(torch.zeros(2, 32))
    activate(body, ["domain"])
    assert body.classify(torch.zeros(2, 32)).shape == (2, 5)


@pytest.mark.parametrize("spec", [PROMPTS, lora("vit")])
def test_tensors_that_do_not_fit_are_refused(spec: AdapterSpec) -> None:
    _, body = parts("vit")
    tensors = with_adapter(body, "domain", spec)
    for odd in (
        {**tensors, "classifier.weight": torch.zeros(6, 32)},
        {name: tensor for name, tensor in tensors.items() if name != "classifier.bias"},
    ):
        with pytest.raises(AdapterMismatch, match="classifier"):
            put_in(body, "domain", odd)
