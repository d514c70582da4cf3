"""An adapter's tensors: read from a body, written into one, saved for peft.

Tensors are named as in peft, without the adapter's name: ``layers.12.self_attn.q_proj.lora_A.weight``, float [rank, in]
for A and [out, rank] for B. Layer numbers are the FM's in every body. Adapters that peft does not have are named alike:
``layers.12.prompts.weight`` [P, D], ``classifier.weight`` [C, D] and ``classifier.bias`` [C]. Replaced weights of a
layer have the names of the originals: ``layers.12.attention.q_proj.weight``.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gaisnet.adapters.full import FullSpec
from gaisnet.adapters.prompts import PromptSpec
from gaisnet.adapters.tuning import AdapterSpec, LoraSpec, parameters_of
from gaisnet.checkpoint import replacing_folder
from gaisnet.errors import AdapterMismatch

AdapterTensors = dict[str, Tensor]


def take_out(body: nn.Module, name: str) -> AdapterTensors:
    """Copy an adapter's tensors from a body. Raises ``AdapterMismatch`` if ``body`` has no such adapter."""
    tensors = {plain: p.detach().clone() for plain, p in parameters_of(body, name).items()}
    if not tensors:
        raise AdapterMismatch(name, "an adapter of this name on the body", "none")
    return tensors


@torch.no_grad()
def put_in(body: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Overwrite an adapter's tensors. Raises ``AdapterMismatch``, before any change, if names or shapes differ."""
    parameters = parameters_of(body, name)
    check_same_shapes(name, parameters, tensors)
    for plain, parameter in parameters.items():
        parameter.copy_(tensors[plain])


def check_same_shapes(name: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ``AdapterMismatch`` unless ``found`` has ``expected``'s names and shapes, and only finite numbers."""
    if expected.keys() != found.keys():
        odd = sorted(expected.keys() ^ found.keys())[0]
        raise AdapterMismatch(name, f"{len(expected)} tensors", f"{len(found)}, different from '{odd}' on")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise AdapterMismatch(name, f"'{key}' of shape {tuple(expected[key].shape)}", f"{tuple(tensor.shape)}")
        if not torch.isfinite(tensor).all():
            raise AdapterMismatch(name, f"finite numbers in '{key}'", "NaN or infinity")


def save_adapter(
    folder: Path, spec: AdapterSpec, tensors: Mapping[str, Tensor], base_model: str, layers_path: str
) -> None:
    """Write an adapter of any kind, whole or not at all; arguments as for ``save_for_peft``.

    Raises ``OutputNotWritable``; an adapter already in ``folder`` then stays.
    """
    with replacing_folder(folder) as scratch:
        if isinstance(spec, PromptSpec):
            save_prompts(scratch, spec, tensors, base_model)
        elif isinstance(spec, FullSpec):
            save_full(scratch, tensors, base_model, layers_path)
        else:
            save_for_peft(scratch, spec, tensors, base_model, layers_path)


def save_for_peft(
    folder: Path, spec: LoraSpec, tensors: Mapping[str, Tensor], base_model: str, layers_path: str = "model.layers"
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` so that plain peft loads them on the FM.

    Args:
        folder: Created if missing.
        spec: Shape of the adapter.
        tensors: The adapter's. A classifier needs an FM made with as many classes.
        base_model: A hub id or an absolute path from which transformers loads the FM; peft looks for it there.
        layers_path: Path to the FM's layers, see ``models.families``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = spec.peft_config()
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.layers_pattern = layers_path.rpartition(".")[2]
    if spec.num_classes:
        config.modules_to_save, config.task_type = ["classifier"], None
    config.save_pretrained(str(folder))
    named = {
        f"base_model.model.{_in_the_model(key, layers_path)}": t.detach().contiguous().cpu()
        for key, t in tensors.items()
    }
    save_file(named, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})


def save_prompts(folder: Path, spec: PromptSpec, tensors: Mapping[str, Tensor], base_model: str) -> None:
    """Write prompts as ``prompts.safetensors``, since peft has no such kind; the metadata describes them."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "format": "pt",
        "method": "VPT-deep",
        "base_model": base_model,
        **{k: str(v) for k, v in asdict(spec).items()},
    }
    plain = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    save_file(plain, str(folder / "prompts.safetensors"), metadata=said)


def save_full(folder: Path, tensors: Mapping[str, Tensor], base_model: str, layers_path: str) -> None:
    """Write weights as ``model.safetensors``, named as in the model, for ``load_state_dict(..., strict=False)``.

    The model must have been made with as many classes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {_in_the_model(key, layers_path): tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
    save_file(named, str(folder / "model.safetensors"), metadata={"format": "pt", "base_model": base_model})


def _in_the_model(key: str, layers_path: str) -> str:
    """Return the name of an adapter's tensor in the whole model."""
    return f"{layers_path}{key.removeprefix('layers')}" if key.startswith("layers.") else key
