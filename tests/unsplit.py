"""Encoders in one piece with adapters, made by others' means: peft, and hooks that put prompts in as the paper says."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.state import AdapterTensors
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec
from gaisnet.models.families import ENCODERS

Whole = tuple[Callable[..., Tensor], dict[str, nn.Parameter]]
"""Logits [B, C] of inputs (and a mask), and the parameters that learn, by the names that GaisNet gives them."""

UNSEEN = ("k_proj.bias", "key.bias")
"""A key's bias moves all of a row's attention alike, which softmax does not see: it has no gradient but rounding."""


def unsplit(model: PreTrainedModel, spec: AdapterSpec, tensors: AdapterTensors) -> Whole:
    """An encoder in one piece with an adapter and the adapter's classifier."""
    if isinstance(spec, LoraSpec):
        return with_lora(model, spec, tensors)
    return with_prompts(model, tensors) if isinstance(spec, PromptSpec) else with_weights(model, tensors)


def with_lora(model: PreTrainedModel, spec: LoraSpec, tensors: AdapterTensors) -> Whole:
    """As anyone who knows peft would make it."""
    path = ENCODERS[model.config.model_type].layers_path
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.targets),
        layers_to_transform=list(spec.layers),
        layers_pattern=path.rpartition(".")[2],
        modules_to_save=["classifier"],
    )
    peft_model = cast(PeftModel, get_peft_model(model, config)).eval()
    parameters = {}
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default.", ".").replace(".modules_to_save.", ".")
            parameters[plain.replace(f"{path}.", "layers.")] = parameter
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        parameter.data = tensors[name].clone()  # a classifier may have other classes than the model's own
    return logits_of(peft_model), parameters


def with_prompts(model: PreTrainedModel, tensors: AdapterTensors) -> Whole:
    """VPT-deep to the letter: rows are put before the sequence, and what a layer makes of them is dropped."""
    parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in tensors.items()}
    path = ENCODERS[model.config.model_type].layers_path
    num = 0
    for index, layer in enumerate(cast(nn.ModuleList, model.get_submodule(path))):
        prompt = parameters.get(f"layers.{index}.prompts.weight")
        if prompt is not None:
            num += 1
            _put_before(layer, prompt)
    assert num + 2 == len(parameters)
    for kind in ("weight", "bias"):
        setattr(model.get_submodule("classifier"), kind, parameters[f"classifier.{kind}"])
    return logits_of(model), parameters


def with_weights(model: PreTrainedModel, tensors: AdapterTensors) -> Whole:
    """The model itself, with these of its weights changed: they learn."""
    path, parameters = ENCODERS[model.config.model_type].layers_path, {}
    for name, tensor in tensors.items():
        module, _, kind = name.replace("layers.", f"{path}.", 1).rpartition(".")
        parameters[name] = nn.Parameter(tensor.clone())
        setattr(model.get_submodule(module), kind, parameters[name])
    return logits_of(model), parameters


def _put_before(layer: nn.Module, prompt_PD: nn.Parameter) -> None:
    num = len(prompt_PD)

    def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden_BTD, mask, *rest = args
        hidden_BTD = torch.cat([prompt_PD.expand(len(hidden_BTD), -1, -1), hidden_BTD], dim=1)
        return (hidden_BTD, mask if mask is None else F.pad(mask, (num, 0, num, 0), value=True), *rest), kwargs

    layer.register_forward_pre_hook(put, with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output_BTD: output_BTD[:, num:])


def logits_of(model: nn.Module) -> Callable[..., Tensor]:
    """Of inputs and a mask of their padding."""

    def run(inputs: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        return cast(Tensor, model(inputs, attention_mask=mask_BT).logits)

    return run


def assert_same_step(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
) -> None:
    """After AdamW's first step, which divides a gradient by its size: of one next to nothing, the last digits count."""
    assert found.keys() == expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None, name
        settled = gradient.abs() > 1e-5
        assert settled.any() or name.endswith(UNSEEN), name
        torch.testing.assert_close(found[name][settled], expected[name][settled], atol=1e-4, rtol=1e-4, msg=name)
        torch.testing.assert_close(found[name], expected[name], atol=0.021, rtol=0.0, msg=name)
