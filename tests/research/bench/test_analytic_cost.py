"""Costs from a shape, against a run: bytes that the ledger counted, tensors held, operations that torch counts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gaisnet.config import Config, DevicePrecision
from gaisnet.config.file import parse_config
from gaisnet.data.examples import Tokens, tokenize
from gaisnet.engines.local import build_network
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.families import Decoder
from gaisnet.models.parts import CutLayers, cut_decoder
from gaisnet.models.release import restrict, rounded
from gaisnet.research.bench.analytic_cost import Work, cost, costs_on_paper
from tests.tiny import NUM_LAYERS, tiny_data, tiny_foundation, tiny_model, tiny_raw_config

WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}


def config(**changes: object) -> Config:
    """One edge, three split devices."""
    devices = [{"name": f"device-{number}", "head_layers": cut} for number, cut in enumerate((1, 2, 2))]
    edge = {"name": "north", "domain": "shapes", "devices": devices}
    raw = tiny_raw_config(edges=[edge], relay={"enabled": False, "tokens": 12}, domain={"precision": "int8"})
    raw["fine_tune"] |= {"local_epochs": 3}
    return parse_config(raw | changes)


@pytest.mark.integration
@pytest.mark.parametrize("smashed", ["int8", "int4", "float16"])
def test_bytes_as_the_ledger_counts_them(smashed: str) -> None:
    run = config(wire={"smashed": smashed})
    data, foundation = tiny_data(run, num_train=16), tiny_foundation(**WIDE)
    tokens = {name: tokenize(mine.train, foundation.tokenizer, 48, name) for name, mine in data.items()}
    network = build_network(run, foundation, {"shapes": TaskTemplate(None, ())}, data, "some public text " * 40)
    network.install()
    network.evaluate()  # hands the devices their parts
    before = network.traffic()["device_edge"]
    network.fine_tune()
    after = network.traffic()["device_edge"]
    num_samples = 3 * 48
    paper = cost(foundation.model.config, run, Work.from_examples(tokens, run.fine_tune.batch_size))
    assert (after.bytes_down - before.bytes_down) / num_samples == pytest.approx(paper.bytes_down, rel=0.03)
    assert (after.bytes_up - before.bytes_up) / num_samples == pytest.approx(paper.bytes_up, rel=0.03)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_device_s_weights_in_few_bits(precision: DevicePrecision) -> None:
    run, foundation = config(device_precision=precision), tiny_foundation(**WIDE)
    network = build_network(run, foundation, {"shapes": TaskTemplate(None, ())}, tiny_data(run), "some text " * 60)
    held = rounded(restrict(network.cloud.model_release, (0, 1)), (0, 1), precision)
    paper = cost(foundation.model.config, run, Work(10, 2, 1))
    assert paper.device_weights_bytes == sum(tensor.nbytes for tensor in held.tensors.values())


@pytest.mark.parametrize("tied", [True, False])
def test_weights_as_they_are_held(tied: bool) -> None:
    run, foundation = config(), tiny_foundation(tied=tied, **WIDE)
    shapes = {"shapes": TaskTemplate(None, ())}
    network = build_network(run, foundation, shapes, tiny_data(run), "some public text " * 40)
    tensors = network.cloud.model_release.tensors
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    paper = cost(foundation.model.config, run, Work(10, 2, 1))
    head = ("embed_tokens.", "lm_head.", "norm.", "layers.0.", "layers.1.")
    assert paper.device_weights_bytes == sum(size for name, size in sizes.items() if name.startswith(head))
    body = tuple(f"layers.{index}." for index in range(1, NUM_LAYERS))  # it begins at the shallowest cut
    assert paper.edge_weights_bytes == sum(size for name, size in sizes.items() if name.startswith(body))
    adapter = network.cloud.adapter_release("domain", "shapes").tensors
    assert paper.adapter_bytes == sum(tensor.nbytes for tensor in adapter.values())


def test_operations_as_torch_counts_them() -> None:
    run, model = config(fine_tune={"local_epochs": 3, "anchor_weight": 0.0}), tiny_model(**WIDE)
    model.set_attn_implementation("eager")
    head, body, tail = cut_decoder(Decoder(model), CutLayers(2))
    tokens = torch.randint(256, (1, 6))  # few: torch counts attention without causality, and its backward twice

    def count(work: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counted:
            work()
        return int(counted.get_total_flops())

    with torch.no_grad():
        hidden = head(tokens)
        prefix_flops, entering = count(lambda: body.run(hidden, 2, 4)), body.run(hidden, 2, 4).clone()
        head_flops = count(lambda: head(tokens))
    entering.requires_grad_()
    suffix_flops = count(lambda: body.run(entering, 4).sum().backward())
    rows = torch.randn(2, 64, requires_grad=True)
    tail_flops = count(lambda: tail.logits(rows).sum().backward())
    paper = cost(model.config, run, Work(positions=6, labels=2, frames=1))
    assert paper.edge_flops == pytest.approx(prefix_flops / 3 + suffix_flops, rel=0.05)
    assert paper.device_flops == pytest.approx(head_flops / 3 + tail_flops, rel=0.05)


def test_how_many_devices_a_batch_is_of() -> None:
    one, two = Tokens((1, 2, 3), (3, 4)), Tokens((1, 2, 3, 4, 5), (5,))
    assert Work.from_examples({"a": [one, two]}, 2) == Work(positions=4, labels=1.5, frames=0.5, devices=0.5)
    halves = Work.from_examples({"a": [one, two], "b": [two, one]}, 2)
    assert halves.frames == pytest.approx(5 / 3 / 2)  # of the six pairs, four are of both devices
    assert Work.from_examples({"a": [one]}, 16).frames == 1


def test_larger_models_cost_more() -> None:
    every = list(costs_on_paper().values())
    for name in type(every[0]).model_fields:
        values = [getattr(own, name) for own in every]
        assert values == sorted(set(values)), name
