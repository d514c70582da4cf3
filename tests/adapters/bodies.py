"""A tiny body with adapters of random numbers."""

import torch
from torch import Tensor

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, add_adapter
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from tests.tiny import tiny_model

TARGETS = ("q_proj", "down_proj")
SPEC = LoraSpec(2, 6, TARGETS, (3, 4, 5))


def body_with(*names: str) -> Body:
    """A body with random adapters, all inactive."""
    _, body, _ = cut_decoder(Decoder(tiny_model(initializer_range=0.2)), CutLayers(1, 0))
    for seed, name in enumerate(names):
        add_adapter(body, name, SPEC, seed)
        generator = torch.Generator().manual_seed(seed)
        put_in(
            body, name, {k: torch.randn(t.shape, generator=generator) * 0.3 for k, t in take_out(body, name).items()}
        )
    return body


def product(adapter: AdapterTensors, module: str, alpha: int, rank: int) -> Tensor:
    a, b = adapter[f"{module}.lora_A.weight"].double(), adapter[f"{module}.lora_B.weight"].double()
    return b @ a * alpha / rank


def hidden() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
