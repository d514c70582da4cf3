"""Mixed adapters on one body: every row of a batch has its own, in the version with which its session began.

A body in training changes its adapter in place. Served adapters are copies, one per version: ``domain@3``, or
``domain@3+`` for one that was trained again under the same number. They are plain tensors beside the body; hooks on
its linear modules add their outputs to the rows that asked for them (as in S-LoRA, arXiv 2311.03285). So the modules
of the body do not change when versions come and go. Adapters that peft has put there for training do not act on served
rows, and a serving thread changes nothing for a thread that trains on the same body.

Shape legend: N rows, R rank.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from gaisnet.adapters.state import check_same_shapes
from gaisnet.adapters.tuning import LoraSpec
from gaisnet.errors import AdapterMismatch, UnknownAdapter

Stack = tuple[str, ...]
"""Names of served adapters that act together on one session, on different modules."""


@dataclass(frozen=True)
class _Factors:
    """An adapter's factors for one linear module; float32, B with the scale in it."""

    a: Tensor  # [R, in]
    b: Tensor  # [out, R]

    def added(self, output: Tensor, input: Tensor, rows_N: Tensor | None) -> Tensor:
        """Return ``output`` plus the adapter's part, at some rows of the first dimension; None for all."""
        chosen = input if rows_N is None else input[rows_N]
        delta = F.linear(F.linear(chosen.to(self.a.dtype), self.a), self.b).to(output.dtype)
        return output + delta if rows_N is None else output.index_add(0, rows_N.to(output.device), delta)

    def same(self, other: "_Factors") -> bool:
        return torch.equal(self.a, other.a) and torch.equal(self.b, other.b)


_Served = Mapping[str, _Factors]  # by the module's path in the body
_NONE = "__base__"  # peft's word for a row without an adapter


class _Batch(threading.local):
    """The batch of this thread: rows of each served adapter, and peft's marker that its own adapters act on none."""

    rows_of: Mapping[str, Tensor | None] = {}
    none: Sequence[str] = ()


class ServedAdapters:
    """Served versions of adapters on one body. For one thread at a time.

    Args:
        body: The body they act on; adapters in training are on it before sessions begin.
    """

    def __init__(self, body: nn.Module) -> None:
        self._body = body
        self._served: dict[str, _Served] = {}
        self._newest: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._hooked: set[str] = set()
        self._learning: set[nn.Module] = set()  # modules that peft has wrapped
        self._batch = _Batch()

    def install(self, name: str, version: int, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> None:
        """Serve a version of an adapter to sessions that begin from now on; an older one goes with its last user.

        Raises ``AdapterMismatch``, and then changes nothing.
        """
        modules = _targets(self._body, spec)
        check_same_shapes(name, _expected(name, modules, spec), tensors)
        adapter = {path: _factors(path, module, spec, tensors) for path, module in modules.items()}
        self._watch()
        self._hook(modules)
        served = self._name_for(f"{name}@{version}", adapter)
        old, self._newest[name] = self._newest.get(name), served
        self._served.setdefault(served, adapter)
        if old is not None:
            self._drop_unused(old)

    def acquire(self, names: Sequence[str]) -> Stack:
        """Return the current versions of these adapters, held until ``give_back``.

        Raises ``UnknownAdapter``, or ``AdapterMismatch`` if two of them sit on the same module.
        """
        self._watch()
        for name in names:
            if name not in self._newest:
                raise UnknownAdapter(name, self._newest)
        stack = tuple(self._newest[name] for name in names)
        for number, served in enumerate(stack):
            for other in stack[:number]:
                if self._served[served].keys() & self._served[other].keys():
                    raise AdapterMismatch(served, f"modules of its own beside '{other}'", "one that both adapt")
        self._users.update(stack)
        return stack

    def give_back(self, stack: Stack) -> None:
        """Release a session's versions; those without users go, unless they are current."""
        self._users.subtract(stack)
        for served in stack:
            self._drop_unused(served)

    @property
    def names(self) -> list[str]:
        """Adapters that sessions may ask for."""
        return sorted(self._newest)

    @property
    def versions(self) -> list[str]:
        """All versions held, each as ``name@version``."""
        return sorted(self._served)

    @contextmanager
    def for_rows(self, stacks: Sequence[Stack]) -> Iterator[None]:
        """Inside the context, row n of a batch through the body has the adapters ``stacks[n]`` and no others."""
        acting = {served for stack in set(stacks) for served in stack}
        self._batch.rows_of = {served: _rows(stacks, served) for served in acting}
        self._batch.none = [_NONE] * len(stacks)
        try:
            yield
        finally:
            self._batch.rows_of, self._batch.none = {}, ()

    def _watch(self) -> None:
        """Remember all modules that peft has wrapped; walking through a body at every token would take too long."""
        for module in self._body.modules():
            if isinstance(module, LoraLayer) and module not in self._learning:
                module.register_forward_pre_hook(self._keep_out, with_kwargs=True)
                self._learning.add(module)

    def _keep_out(self, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Forward hook of modules that peft has wrapped: keeps its adapters away from served rows."""
        return (args, {**kwargs, "adapter_names": self._batch.none}) if self._batch.none else None

    def _hook(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook a module once. If peft wraps it later, it is the wrapper's base and still called."""
        for path in modules.keys() - self._hooked:
            modules[path].register_forward_hook(partial(self._add, path))
            self._hooked.add(path)

    def _add(self, path: str, _module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """Forward hook of every adapted module; does nothing outside of ``for_rows``."""
        for served, rows_N in self._batch.rows_of.items():
            factors = self._served[served].get(path)
            if factors is not None:
                output = factors.added(output, args[0], rows_N)
        return output

    def _name_for(self, served: str, adapter: _Served) -> str:
        """Return a version's name.

        Held versions never change, even if an interrupted cycle gives the same number again.
        """
        while served in self._served and not _same(self._served[served], adapter):
            served += "+"
        return served

    def _drop_unused(self, served: str) -> None:
        if self._users[served] <= 0:
            del self._users[served]
            if served not in self._newest.values():
                self._served.pop(served, None)


def _targets(body: nn.Module, spec: LoraSpec) -> dict[str, nn.Module]:
    """Return the linear modules that an adapter acts on, by path, in the layers that the body has."""

    def meant(path: str) -> bool:
        parts = path.split(".")
        return len(parts) > 2 and parts[0] == "layers" and int(parts[1]) in spec.layers and parts[-1] in spec.targets

    return {path: module for path, module in body.named_modules() if meant(path)}


def _expected(name: str, modules: Mapping[str, nn.Module], spec: LoraSpec) -> dict[str, Tensor]:
    """Return tensors of the right shapes without data."""
    if not modules:
        raise AdapterMismatch(name, f"linear modules named {', '.join(spec.targets)}", "none in the body's layers")
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in modules.items():
        size_in, size_out = module.in_features, module.out_features
        shapes[f"{path}.lora_A.weight"] = spec.rank, size_in  # type: ignore[assignment]
        shapes[f"{path}.lora_B.weight"] = size_out, spec.rank  # type: ignore[assignment]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def _factors(path: str, module: nn.Module, spec: LoraSpec, tensors: Mapping[str, Tensor]) -> _Factors:
    device = next(iter((*module.parameters(), *module.buffers()))).device
    a, b = (tensors[f"{path}.lora_{letter}.weight"].detach().to(device, torch.float32) for letter in "AB")
    return _Factors(a.clone(), b * (spec.alpha / spec.rank))


def _same(some: _Served, others: _Served) -> bool:
    return some.keys() == others.keys() and all(factors.same(others[path]) for path, factors in some.items())


def _rows(stacks: Sequence[Stack], served: str) -> Tensor | None:
    rows = [number for number, stack in enumerate(stacks) if served in stack]
    return None if len(rows) == len(stacks) else torch.tensor(rows)
