"""Adapters of frozen layers: LoRA (Hu et al., arXiv 2106.09685) through peft, deep prompts, or full weights.

An adapter has a name. Several may sit on one body; the active ones add up. On an encoder an adapter may have its
own classifier. Of adapters with a classifier or full weights, one at a time can be active.
"""

import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn

from gaisnet.adapters.classifier import add_classifier, check_classifying
from gaisnet.adapters.full import FullSpec, add_full
from gaisnet.adapters.prompts import PromptSpec, add_prompts
from gaisnet.adapters.slot import IN_PLACE, Slot, peft_name
from gaisnet.errors import AdapterMismatch
from gaisnet.onednn import add_low_rank


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a LoRA adapter: everything that its tensors do not tell.

    Attributes:
        rank: Rank of every product.
        alpha: Numerator of the scale; the scale is alpha / rank.
        targets: Names of linear modules in a layer.
        layers: FM numbers of the layers.
        num_classes: Classes of the adapter's own classifier; 0 if it has none.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    num_classes: int = 0

    def peft_config(self) -> LoraConfig:
        """Return the equivalent configuration of peft."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            layers_to_transform=list(self.layers),
            layers_pattern="layers",
            bias="none",
            task_type="CAUSAL_LM",
        )


AdapterSpec = LoraSpec | PromptSpec | FullSpec


class _Fused(LoraVariant):
    """Tells peft how to run an adapter: unchanged, but as one operation during training."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """Return ``result`` [..., out] plus the adapter's output for ``x`` [..., in]."""
        a, b, scale = (factors[active_adapter] for factors in (module.lora_A, module.lora_B, module.scaling))
        if a.weight.requires_grad:
            return add_low_rank(result, x, a.weight, b.weight, scale)
        plain: Tensor = result + b(a(x)) * scale  # as in peft: answers keep their bits
        return plain


def add_adapter(body: nn.Module, name: str, spec: AdapterSpec, seed: int) -> None:
    """Put a new adapter, random from ``seed``, beside the layers of ``body``; it starts inactive and frozen.

    A LoRA's B is zero, and full weights are copies, so both do nothing yet. Prompts and a classifier
    act as soon as they are active.

    Raises ``AdapterMismatch`` if no linear module of ``body`` is a target, or the body does not take such an adapter.
    """
    active = active_adapters(body)
    if spec.num_classes:
        check_classifying(body, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(spec, PromptSpec):
            add_prompts(body, name, spec)
        elif isinstance(spec, FullSpec):
            add_full(body, name, spec)
        else:
            _add_lora(body, name, spec)
        if spec.num_classes:
            add_classifier(body, name, spec.num_classes)
    activate(body, active)
    body.eval()  # new modules start in training mode


def _add_lora(body: nn.Module, name: str, spec: LoraSpec) -> None:
    try:
        with warnings.catch_warnings():  # several adapters on one body are intended
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
            inject_adapter_in_model(spec.peft_config(), body, adapter_name=peft_name(name))
    except ValueError as error:
        raise AdapterMismatch(name, f"linear modules named {', '.join(spec.targets)}", str(error)) from error
    for module in _adapted(body):
        if peft_name(name) in module.lora_A:
            for factors in (module.lora_A, module.lora_B):
                factors[peft_name(name)].float()  # half precision would lose small steps of the optimizer
            module.lora_variant[peft_name(name)] = _Fused()


def activate(body: nn.Module, names: Iterable[str]) -> None:
    """Activate exactly these adapters; all are frozen. Raises ``AdapterMismatch`` if they cannot be active together."""
    plain, slots = tuple(names), _slots(body)
    for slot in slots:
        slot.check(plain)
    for slot in slots:
        slot.act(plain)
        slot.requires_grad_(False)
    wanted = [peft_name(name) for name in plain]
    for layer in _adapted(body):
        mine = [name for name in wanted if name in layer.lora_A]
        layer.enable_adapters(bool(mine))
        if mine:
            layer.set_adapter(mine, inference_mode=True)


def active_adapters(body: nn.Module) -> list[str]:
    """Return the names of the active adapters, sorted."""
    names = {n for layer in _adapted(body) if not layer.disable_adapters for n in layer.active_adapters}
    names |= {n for slot in _slots(body) for n in slot.acting}
    return sorted(name.removeprefix(peft_name("")) for name in names)


def has_adapter(body: nn.Module, name: str) -> bool:
    """Return whether an adapter of this name sits on ``body``."""
    places = [*(layer.lora_A for layer in _adapted(body)), *_slots(body)]
    return any(peft_name(name) in place for place in places)


@contextmanager
def watched(layer: nn.Module, name: str) -> Iterator[dict[str, list[Tensor]]]:
    """Record the inputs of each module of ``layer`` that has an adapter, call after call, by the module's path.

    Only this thread's calls count: another may serve the same layer meanwhile.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for path, module in layer.named_modules():
        if isinstance(module, LoraLayer) and peft_name(name) in module.lora_A:
            seen[path] = []
            keep = partial(_keep_input, seen[path], threading.get_ident())
            handles.append(cast(nn.Module, module).register_forward_pre_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _keep_input(seen: list[Tensor], thread: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    if threading.get_ident() == thread:
        seen.append(inputs[0])


def trainable(body: nn.Module, name: str) -> list[nn.Parameter]:
    """Unfreeze one adapter and freeze everything else; return its parameters in a fixed order."""
    body.requires_grad_(False)
    chosen = list(parameters_of(body, name).values())
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def parameters_of(body: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return an adapter's own parameters on ``body``, named without the adapter, in a fixed order."""
    inner, found = f".{peft_name(name)}", {}
    for path, parameter in body.named_parameters(remove_duplicate=False):  # one that is active in place is there twice
        module, _, kind = path.rpartition(".")  # kind: weight or bias
        if module.endswith(inner):
            place = module.removesuffix(inner)
            if place.endswith(IN_PLACE):
                place = place.removesuffix(f".{IN_PLACE}").removesuffix(".base_layer")  # added by peft
            found[f"{place}.{kind}"] = parameter
    return found


def _adapted(body: nn.Module) -> Sequence[LoraLayer]:
    return [module for module in body.modules() if isinstance(module, LoraLayer)]


def _slots(body: nn.Module) -> Sequence[Slot]:
    return [module for module in body.modules() if isinstance(module, Slot)]
