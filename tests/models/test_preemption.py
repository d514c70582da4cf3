"""Pauses inside of layers change no result and come often enough."""

import copy

import torch

from gaisnet.models.families import Decoder
from gaisnet.models.parts import CutLayers, cut_decoder
from gaisnet.models.preemption import pause_within
from tests.tiny import NUM_LAYERS, tiny_model

PARTS = 7  # projections of a layer


def test_pauses_come_forward_and_backward_and_change_nothing() -> None:
    plain = cut_decoder(Decoder(tiny_model(initializer_range=0.1)), CutLayers(0))[1]
    pausing = copy.deepcopy(plain)
    counted: list[None] = []
    pause_within(pausing.layers.values(), lambda: counted.append(None))
    start_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for body in (plain, pausing):
        inputs_BTD = start_BTD.clone().requires_grad_()
        output_BTD = body(inputs_BTD)
        forward = len(counted)
        output_BTD.square().sum().backward()
        results.append((output_BTD, inputs_BTD.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert forward >= PARTS * NUM_LAYERS
    assert len(counted) - forward >= PARTS * NUM_LAYERS


def test_copies_pause_as_well() -> None:
    body = cut_decoder(Decoder(tiny_model()), CutLayers(0))[1]
    counted: list[None] = []
    pause_within(body.layers.values(), lambda: counted.append(None))
    copy.deepcopy(body.layers["3"])(
        torch.randn(1, 2, 32), position_embeddings=body.rotary_emb(torch.zeros(1), torch.arange(2)[None])
    )
    assert len(counted) >= PARTS
