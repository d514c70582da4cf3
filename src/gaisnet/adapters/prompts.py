"""Deep prompts: trained rows before the sequence at the input of every adapted layer (VPT-deep, arXiv 2203.12119).

In the paper these rows run through the layer, and their outputs are dropped before the next layer's own rows are put
in. So only their keys and values matter to the others. Nothing else of them is computed here, and the result is the
same.

Shape legend: P rows of a prompt, D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from gaisnet.adapters.slot import Slot, peft_name
from gaisnet.errors import AdapterMismatch


@dataclass(frozen=True)
class PromptSpec:
    """Shape of an adapter of deep prompts.

    Attributes:
        num_rows: Rows of the prompt in each layer.
        layers: FM numbers of the layers.
        num_classes: Classes of the adapter's own classifier; 0 if it has none.
    """

    num_rows: int
    layers: tuple[int, ...]
    num_classes: int = 0


@runtime_checkable
class Seeing(Protocol):
    """A body whose positions can attend to extra rows."""

    config: PretrainedConfig
    layers: nn.ModuleDict  # by FM number

    def let_see(self, layer: int, rows: Callable[[], Tensor | None]) -> None:
        """Let a layer's positions attend to the returned rows [P, D], given at the layer's input; None for none."""


class Prompts(Slot):
    """The prompts of one layer, by adapter."""

    def rows(self) -> Tensor | None:
        """Return the active rows, [P, D] in all; None if there are none."""
        prompts = tuple(cast(_Prompt, self[name]).weight for name in self.acting)
        return torch.cat(prompts) if prompts else None


class _Prompt(nn.Module):
    """One prompt: ``weight`` [P, D], float32."""

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, width))
        nn.init.xavier_uniform_(self.weight)
        self.to(device)


def add_prompts(body: nn.Module, name: str, spec: PromptSpec) -> None:
    """Put random prompts before the layers of ``body``. Raises ``AdapterMismatch``, before any change."""
    if not isinstance(body, Seeing):
        raise AdapterMismatch(name, "the body of an encoder, for it has deep prompts", "one that cannot show them")
    missing = [index for index in spec.layers if str(index) not in body.layers]
    if missing or not spec.layers or spec.num_rows < 1:
        expected = f"layers of the body for {spec.num_rows} rows each"
        raise AdapterMismatch(name, expected, f"it lacks {missing}" if missing else "none")
    for index in spec.layers:
        layer: Any = body.layers[str(index)]
        if not hasattr(layer, "prompts"):
            layer.prompts = Prompts()
            body.let_see(index, layer.prompts.rows)
        device = next(layer.parameters()).device
        layer.prompts[peft_name(name)] = _Prompt(spec.num_rows, body.config.hidden_size, device)
