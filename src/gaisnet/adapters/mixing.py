"""Many adapters on one body at once: every row of a batch has its own, and keeps the version that it began with.

A body that learns changes its adapter in place. What is served are copies under names of their own, one per version:
``domain@3``, or ``domain@3+`` for one that was learned again under the same number. Rows of one batch name different
ones through peft's mixed batches (S-LoRA's idea, arXiv 2311.03285).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gaisnet.adapters.state import put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, add_adapter, peft_name
from gaisnet.errors import AdapterMismatch, UnknownAdapter

Stack = tuple[str, ...]
"""Names of served adapters that act together on one session, on different layers."""

_NONE = "__base__"  # peft's word for a row without an adapter


class ServedAdapters:
    """The versions of adapters that are served on one body. Not for several threads at once, nor during a forward.

    Args:
        body: Where they sit, beside those that learn, which are there before sessions begin.
    """

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        self._newest: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._hooks: dict[LoraLayer, RemovableHandle] = {}  # on every adapted module, whoever's the adapter is
        self._stacks: Sequence[Stack] = ()
        self._rows_of: dict[frozenset[str], list[str]] = {}

    def put(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve a version of an adapter to sessions that begin from now on; an older one goes with its last user.

        Raises ``AdapterMismatch``, and then serves what it served.
        """
        served = self._name_for(name, version, tensors)
        if self._newest.get(name) == served:
            return
        if not self._holds(served):
            with self._others_as_they_are():
                add_adapter(self._body, served, spec, seed=0)
        try:
            put_in(self._body, served, tensors)
        except AdapterMismatch:
            self._remove(served)
            raise
        self._watch()
        old = self._newest.get(name)
        self._newest[name] = served
        if old is not None and not self._users[old]:
            self._remove(old)

    def take(self, names: Sequence[str]) -> Stack:
        """The present versions of these adapters, kept until ``give_back``.

        Raises ``UnknownAdapter``, or ``AdapterMismatch`` where two of them sit on the same module.
        """
        self._watch()
        for name in names:
            if name not in self._newest:
                raise UnknownAdapter(name, self._newest)
        stack = tuple(self._newest[name] for name in names)
        for layer in self._layers():
            if len(both := [n for n in stack if peft_name(n) in layer.lora_A]) > 1:
                raise AdapterMismatch(both[1], f"layers of its own beside '{both[0]}'", "a layer that both adapt")
        self._users.update(stack)
        return stack

    def give_back(self, stack: Stack) -> None:
        """A session has ended; versions that nobody else uses and that are not the present ones go."""
        self._users.subtract(stack)
        for served in stack:
            if self._users[served] <= 0:
                del self._users[served]
                if served not in self._newest.values():
                    self._remove(served)

    @contextmanager
    def for_rows(self, stacks: Sequence[Stack]) -> Iterator[None]:
        """Inside, row n of what runs through the body has the adapters ``stacks[n]`` and no others."""
        disabled = [layer for layer in self._hooks if layer.disable_adapters]
        for layer in disabled:
            layer._disable_adapters = False
        self._stacks = stacks
        try:
            yield
        finally:
            self._stacks = ()
            self._rows_of.clear()
            for layer in disabled:
                layer._disable_adapters = True

    def _name_adapters(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward hook of every adapted layer; does nothing outside of ``for_rows``."""
        if not self._stacks:
            return None
        here = frozenset(layer.lora_A)  # type: ignore[arg-type]
        if here not in self._rows_of:
            one_of = {s: next((n for n in map(peft_name, s) if n in here), _NONE) for s in set(self._stacks)}
            self._rows_of[here] = [one_of[stack] for stack in self._stacks]
        return args, {**kwargs, "adapter_names": self._rows_of[here]}

    def _watch(self) -> None:
        """Know all adapted modules; walking through a body at every token would take longer than some of its layers."""
        for layer in self._layers():
            if layer not in self._hooks:
                module = cast(nn.Module, layer)
                self._hooks[layer] = module.register_forward_pre_hook(self._name_adapters, with_kwargs=True)

    @property
    def names(self) -> list[str]:
        """Adapters that sessions may ask for."""
        return sorted(self._newest)

    def _name_for(self, name: str, version: int, tensors: Mapping[str, Tensor]) -> str:
        """What sessions have stays as it is, even where a cycle that was broken off gives the same number again."""
        served = f"{name}@{version}"
        while self._holds(served) and not _same(take_out(self._body, served), tensors):
            served += "+"
        return served

    def _holds(self, served: str) -> bool:
        return any(peft_name(served) in layer.lora_A for layer in self._layers())

    def _remove(self, served: str) -> None:
        with self._others_as_they_are():
            for layer in self._layers():  # peft would let another one act in its place
                layer.set_adapter([name for name in layer.active_adapters if name != peft_name(served)])
                layer.delete_adapter(peft_name(served))
        configs: dict[str, Any] = getattr(self._body, "peft_config", {})
        configs.pop(peft_name(served), None)

    @contextmanager
    def _others_as_they_are(self) -> Iterator[None]:
        """What learns on the body still learns afterwards: peft freezes and thaws as it goes."""
        before = {parameter: parameter.requires_grad for parameter in self._body.parameters()}
        try:
            yield
        finally:
            for parameter in self._body.parameters():
                parameter.requires_grad_(before.get(parameter, False))

    def _layers(self) -> list[LoraLayer]:
        return [module for module in self._body.modules() if isinstance(module, LoraLayer)]


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(t.cpu(), others[key].cpu()) for key, t in some.items())
