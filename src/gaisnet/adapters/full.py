"""Full tuning: an adapter with all weights of the adapted layers, which replace the model's while it is active.

Activation copies nothing: modules get other parameters. The model's own weights are unchanged to the bit as soon as no
adapter is active. Each adapter takes as much memory as the layers that it adapts, in addition to theirs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from gaisnet.adapters.slot import IN_PLACE, OneOf, Slot, peft_name
from gaisnet.errors import AdapterMismatch

_OWN = "own"  # unlike any ``peft_name``


@dataclass(frozen=True)
class FullSpec:
    """Shape of an adapter with all weights of some layers.

    Attributes:
        layers: FM numbers of the layers.
        num_classes: Classes of the adapter's own classifier; 0 if it has none.
    """

    layers: tuple[int, ...]
    num_classes: int = 0


class Weights(OneOf):
    """Weights of one module: its own, and those of adapters.

    Args:
        module: Gets the weights of the active adapter, else its own.
    """

    kind: ClassVar[str] = "weights of a layer"

    def __init__(self, module: nn.Module) -> None:
        super().__init__({_OWN: _Parameters(dict(module.named_parameters(recurse=False)))})
        self._of = (module,)  # a tuple, since a module must not be inside of its own child

    def copy_for(self, name: str) -> None:
        """Give an adapter weights, copied from the module's own."""
        own = self[_OWN].named_parameters()
        self[peft_name(name)] = _Parameters({kind: nn.Parameter(each.detach().clone()) for kind, each in own})

    def act(self, names: Iterable[str]) -> None:
        """Activate an adapter; see ``Slot``."""
        super().act(names)
        for kind, parameter in self[self.acting[0] if self.acting else _OWN].named_parameters():
            setattr(self._of[0], kind, parameter)


class _Parameters(nn.Module):
    """Parameters, by the names that they have in a module."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for kind, parameter in parameters.items():
            self.register_parameter(kind, parameter)


def add_full(body: Any, name: str, spec: FullSpec) -> None:
    """Give an adapter weights for layers of ``body``, a ``Layers``. Raises ``AdapterMismatch``, before any change."""
    missing = [index for index in spec.layers if str(index) not in body.layers]
    if missing or not spec.layers:
        raise AdapterMismatch(name, "layers of the body", f"it lacks {missing}" if missing else "none")
    layers = [body.layers[str(index)] for index in spec.layers]
    if any(True for layer in layers for _ in layer.buffers()):
        raise AdapterMismatch(name, "layers whose weights are all floating numbers", "some in int8 or fewer bits")
    for module in (module for layer in layers for module in _with_weights(layer)):
        if not hasattr(module, IN_PLACE):
            setattr(module, IN_PLACE, Weights(module))
        getattr(module, IN_PLACE).copy_for(name)


def _with_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Yield modules with weights of their own, adapters excluded."""
    children = [module.get_base_layer()] if isinstance(module, LoraLayer) else module.children()
    for child in children:
        if not isinstance(child, Slot):
            yield from _with_weights(child)
    if next(module.parameters(recurse=False), None) is not None:
        yield module
