"""Tiny models cut and served, and the same models in one piece."""

import copy
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gaisnet.adapters.state import AdapterTensors, put_in, take_out
from gaisnet.adapters.tuning import LoraSpec, activate, add_adapter
from gaisnet.config import ServiceSettings
from gaisnet.models.families import Decoder
from gaisnet.models.parts import Body, CutLayers, cut_decoder
from gaisnet.models.recipe import Middle, Recipe, make_domain_body
from gaisnet.serving.engine.body import BodyService
from gaisnet.serving.generation.decoding import DeviceParts
from tests.tiny import NUM_LAYERS, VOCAB, tiny_model

DOMAIN = LoraSpec(rank=2, alpha=8, targets=("q_proj", "v_proj", "down_proj"), layers=(4, 5))
RELAY = LoraSpec(rank=2, alpha=8, targets=("q_proj", "up_proj"), layers=(1, 2, 3))


def lively_model(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """With weights large enough that it does not repeat itself."""
    return tiny_model(family, **{"initializer_range": 0.3, **changes})


def served(
    model: PreTrainedModel, cut: CutLayers, settings: ServiceSettings | None = None
) -> tuple[DeviceParts, BodyService]:
    head, body, tail = cut_decoder(Decoder(model), cut)
    layers = range(cut.head, NUM_LAYERS - cut.tail)
    return DeviceParts(head, tail), BodyService(body, layers, settings or ServiceSettings())


def domain_body(model: PreTrainedModel, first: int, kept: tuple[int, ...], precision: str = "int8") -> Body:
    """A DM's body from layer ``first`` on: of layers 1 to 3 some dropped, the others in int8 or as they are."""
    middle = Middle(1, 4)
    recipe = Recipe(kept, tuple(i for i in kept if i in middle) if precision == "int8" else ())
    hidden_BTD = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(3))
    return make_domain_body(Decoder(model), first, NUM_LAYERS, recipe, middle, hidden_BTD)


def served_domain(
    model: PreTrainedModel, kept: tuple[int, ...] = tuple(range(NUM_LAYERS))
) -> tuple[PreTrainedModel, DeviceParts, BodyService]:
    """A DM in one piece, and its parts cut after layer 0."""
    whole = copy.deepcopy(model)
    whole.model.layers = torch.nn.ModuleList(domain_body(model, 0, kept).layers.values())
    head, _, tail = cut_decoder(Decoder(model), CutLayers(1))
    service = BodyService(domain_body(model, 1, kept), range(1, NUM_LAYERS), ServiceSettings())
    return whole, DeviceParts(head, tail), service


class LocalSession:
    """A session of a service in this process.

    Args:
        service: The service.
        first: FM layer that takes the rows.
        stop: FM layer to stop before.
        adapters: Adapters to activate.
        num_positions: Positions to reserve memory for.
    """

    def __init__(
        self, service: BodyService, first: int, stop: int, adapters: Sequence[str] = (), num_positions: int = 0
    ) -> None:
        self.deadline_s = None
        self._service = service
        self._name = service.open_session(first, stop, adapters, num_positions)

    def send(self, rows_TD: Tensor, want: int) -> "Future[Tensor]":
        """Run new positions; if no thread runs steps, the caller does."""
        answer = self._service.extend_session(self._name, rows_TD, want)
        while not self._service.in_thread and not answer.done():
            self._service.step()
        return answer

    def extend(self, rows_TD: Tensor, want: int) -> Tensor:
        """Run new positions."""
        return self.send(rows_TD, want).result()

    def crop(self, length: int) -> None:
        """Drop positions from ``length`` on."""
        self._service.crop_session(self._name, length)

    def close(self) -> None:
        """Close the session."""
        self._service.close_session(self._name)


def session(parts: DeviceParts, service: BodyService, adapters: tuple[str, ...] = ()) -> LocalSession:
    return LocalSession(service, parts.first, parts.stop, adapters)


def adapter(spec: LoraSpec, seed: int) -> AdapterTensors:
    """Tensors of an adapter that changes what the model writes."""
    body = cut_decoder(Decoder(lively_model()), CutLayers(0, 0))[1]
    add_adapter(body, "any", spec, seed)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(t.shape, generator=generator) for name, t in take_out(body, "any").items()}


def with_adapters(model: PreTrainedModel, **adapters: tuple[LoraSpec, AdapterTensors]) -> PreTrainedModel:
    """The same model in one piece, with adapters that act."""
    whole = copy.deepcopy(model)
    for name, (spec, tensors) in adapters.items():
        add_adapter(whole.model, name, spec, seed=0)
        put_in(whole.model, name, tensors)
    activate(whole.model, adapters)
    return whole


def prompt(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def generated(model: PreTrainedModel, ids: list[int], num_tokens: int) -> list[int]:
    """What ``transformers.generate`` writes, greedily."""
    input_ids = torch.tensor([ids])
    output = model.generate(  # type: ignore[operator]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=VOCAB - 1,
    )
    answer: list[int] = output[0, len(ids) :].tolist()
    return answer
