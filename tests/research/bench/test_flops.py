"""Operations from a shape, against what torch counts where it can."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gaisnet.data.examples import Tokens
from gaisnet.research.bench.contenders.flops import Shape, of_split_device, of_whole_model
from tests.tiny import NUM_LAYERS, tiny_model


def test_a_forward_pass_as_torch_counts_it() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    shape = Shape.from_model_config(model.config)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.randint(256, (1, 40)))
    attention = 2 * 2 * shape.attention_width * 40 / 2 * 40 * NUM_LAYERS  # torch counts what causality leaves out
    assert shape.layers(NUM_LAYERS, 40) + shape.vocabulary(40) + attention == pytest.approx(
        counted.get_total_flops(), rel=0.01
    )


def test_what_a_device_saves() -> None:
    shape, examples = Shape.from_model_config(tiny_model().config), [Tokens(tuple(range(20)), (1, 2))] * 3
    cached = of_split_device(shape, 1, examples, 4, cached=True)
    plain = of_split_device(shape, 1, examples, 4, cached=False)
    assert plain - cached == pytest.approx(shape.layers(1, 20) * 3 / 4)
    assert of_whole_model(shape, 0, examples) > of_whole_model(shape, 3, examples) > plain
