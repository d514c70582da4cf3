"""Adapters beside frozen layers: LoRA (Hu et al., arXiv 2106.09685), put in through peft.

An adapter has a name. Several may sit on one body; those that are active add up.
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

from gaisnet.errors import AdapterMismatch
from gaisnet.products import add_low_rank


@dataclass(frozen=True)
class LoraSpec:
    """Shape of a LoRA adapter: everything that its tensors do not say."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def peft_config(self) -> LoraConfig:
        """The same in peft's words."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.targets),
            layers_to_transform=list(self.layers),
            layers_pattern="layers",
            bias="none",
            task_type="CAUSAL_LM",
        )


class _Fused(LoraVariant):
    """Tells peft how to run an adapter: as it does by itself, but in one operation where the adapter learns."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result`` [..., out] and what the adapter makes of ``x`` [..., in]."""
        a, b, scale = (factors[active_adapter] for factors in (module.lora_A, module.lora_B, module.scaling))
        if a.weight.requires_grad:
            return add_low_rank(result, x, a.weight, b.weight, scale)
        plain: Tensor = result + b(a(x)) * scale  # as in peft: answers keep their bits
        return plain


def peft_name(name: str) -> str:
    """An adapter's name inside peft: unlike any module or attribute, whatever the user calls a domain."""
    return f"adapter-{name}"


def add_adapter(body: nn.Module, name: str, spec: LoraSpec, seed: int) -> None:
    """Put a new adapter (B zero, A random from ``seed``) beside the layers of ``body``; it starts inactive and frozen.

    Raises ``AdapterMismatch`` where no linear module of ``body`` is a target.
    """
    active = active_adapters(body)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():  # several adapters on one body are what we want
                warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
                inject_adapter_in_model(spec.peft_config(), body, adapter_name=peft_name(name))
        except ValueError as error:
            raise AdapterMismatch(name, f"linear modules named {', '.join(spec.targets)}", str(error)) from error
    for module in _adapted(body):
        if peft_name(name) in module.lora_A:
            for factors in (module.lora_A, module.lora_B):
                factors[peft_name(name)].float()  # half precision would lose small steps of the optimizer
            module.lora_variant[peft_name(name)] = _Fused()
    activate(body, active)
    body.eval()  # peft's new modules start in training mode


def activate(body: nn.Module, names: Iterable[str]) -> None:
    """Let exactly these adapters act; all are frozen."""
    wanted = [peft_name(name) for name in names]
    for layer in _adapted(body):
        mine = [name for name in wanted if name in layer.lora_A]
        layer.enable_adapters(bool(mine))
        if mine:
            layer.set_adapter(mine, inference_mode=True)


def active_adapters(body: nn.Module) -> list[str]:
    """Names of the adapters that act, sorted."""
    names = {n for layer in _adapted(body) if not layer.disable_adapters for n in layer.active_adapters}
    return sorted(name.removeprefix(peft_name("")) for name in names)


def has_adapter(body: nn.Module, name: str) -> bool:
    """Whether an adapter of this name sits on ``body``."""
    return any(peft_name(name) in layer.lora_A for layer in _adapted(body))


@contextmanager
def watched(layer: nn.Module, name: str) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, what enters each module of ``layer`` that an adapter sits on, call after call, by the module's path.

    What this thread makes enter: another may serve the same layer meanwhile.
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
    """Unfreeze one adapter and freeze everything else; returns its parameters in a fixed order."""
    chosen = []
    for path, parameter in body.named_parameters():
        parameter.requires_grad_(path.endswith(f".{peft_name(name)}.weight"))
        if parameter.requires_grad:
            chosen.append(parameter)
    return chosen


def _adapted(body: nn.Module) -> Sequence[LoraLayer]:
    return [module for module in body.modules() if isinstance(module, LoraLayer)]
