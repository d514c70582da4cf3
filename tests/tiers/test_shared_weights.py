"""Devices of one machine share equal weights, with unchanged results."""

import gc
import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import Config
from gaisnet.engines.local import build_network
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import AdapterUpdate, BodyOutput, FineTune, Message, ModelRelease, SmashRequest
from gaisnet.models.release import restrict
from gaisnet.network import Network
from gaisnet.tiers.device.device import Device
from gaisnet.tiers.device.shared_weights import SharedWeights
from gaisnet.transport.codec import Codec
from tests.tiny import tiny_config, tiny_data, tiny_edge, tiny_foundation, tiny_tokenizer

WIDTH = 32


def config() -> Config:
    """Two split devices with different cuts, two local ones."""
    edge = tiny_edge("north", "shapes")
    edge["devices"].append({"name": "north-d", "mode": "local"})
    return tiny_config(edges=[edge])


def network(settings: Config) -> Network:
    shapes = {"shapes": TaskTemplate(None, ())}
    return build_network(settings, tiny_foundation(), shapes, tiny_data(settings), "some public text " * 40)


def devices(settings: Config, stock: SharedWeights | None) -> dict[str, Device]:
    data = tiny_data(settings)
    return {
        one.name: Device(one, settings, tiny_tokenizer(), data[one.name], shared_weights=stock)
        for _, one in settings.each_device()
    }


def equipped(
    settings: Config, stock: SharedWeights | None, release: ModelRelease, kit: list[Message]
) -> dict[str, Device]:
    """Build all devices from releases that crossed separate links."""
    codec, every = Codec(settings.wire), devices(settings, stock)
    for one in settings.edges[0].devices:
        mine = release if one.mode == "local" else restrict(release, range(one.head_layers))
        for message in [mine, *(kit if one.mode == "local" else [])]:
            every[one.name].handle(codec.decode(codec.encode(message)))
    return every


def answers(device: Device, local: bool) -> Mapping[str, Tensor]:
    """Return a device's activations, gradients and locally trained adapter."""
    torch.manual_seed(0)
    smashed = device.handle(SmashRequest("train"))
    rows_ND = torch.randn(int(smashed.num_labels_E[0]), WIDTH)  # type: ignore[attr-defined]
    grad = device.handle(BodyOutput("train", 0, 9, torch.zeros(1, dtype=torch.int32), rows_ND))
    found = {"smashed": smashed.hidden_ND, "grad": grad.grad_ND}  # type: ignore[attr-defined]
    if local:
        update = device.handle(FineTune(0))
        assert isinstance(update, AdapterUpdate)
        found |= update.tensors
    return found


def test_shared_parts_change_no_result() -> None:
    settings = config()
    cloud = network(settings).cloud
    release = cloud.model_release
    kit: list[Message] = [
        cloud.anchor_release,
        *(cloud.adapter_release(role, "shapes") for role in ("relay", "domain")),
    ]
    alone = equipped(settings, None, release, kit)
    together = equipped(settings, SharedWeights(settings, ComputeLock()), release, kit)
    for one in settings.edges[0].devices:
        local = one.mode == "local"
        expected, found = answers(alone[one.name], local), answers(together[one.name], local)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), one.name
    every = [each for device in together.values() for part in device.decoder_parts() for each in part.parameters()]
    assert all(not each.requires_grad for each in every)


def test_embeddings_are_there_once_whatever_the_cuts() -> None:
    settings = config()
    every = equipped(settings, SharedWeights(settings, ComputeLock()), network(settings).cloud.model_release, [])
    heads = [device.decoder_parts()[0] for device in every.values()]
    layers = [dict(head.stack.layers["0"].named_parameters())["mlp.up_proj.weight"] for head in heads]
    assert len({next(head.embed_tokens.parameters()).data_ptr() for head in heads}) == 1
    assert len({weight.data_ptr() for weight in layers}) == 1
    first, deeper, local, another = heads
    assert local is another
    assert first is not deeper


def test_other_weights_are_others() -> None:
    settings = config()
    stock, release = SharedWeights(settings, ComputeLock()), restrict(network(settings).cloud.model_release, range(1))
    one = settings.edges[0].devices[0]
    changed = ModelRelease(
        release.config_json,
        release.layers,
        release.int8_layers,
        {name: tensor + 1 if name == "norm.weight" else tensor for name, tensor in release.tensors.items()},
    )
    parts, others = stock.get_device_weights(release, one), stock.get_device_weights(changed, one)
    assert parts is not others
    (head, tail), (other_head, other_tail) = parts.decoder_parts(), others.decoder_parts()
    assert not torch.equal(next(tail.norm.parameters()), next(other_tail.norm.parameters()))
    embeddings, others_embeddings = (next(each.embed_tokens.parameters()) for each in (head, other_head))
    assert embeddings.data_ptr() == others_embeddings.data_ptr()


def test_nothing_is_kept_for_nobody() -> None:
    settings = config()
    stock, release = SharedWeights(settings, ComputeLock()), network(settings).cloud.model_release
    every = equipped(settings, stock, release, [])
    head = weakref.ref(every["north-a"].decoder_parts()[0])
    assert head() is not None
    every.clear()
    gc.collect()
    assert head() is None
