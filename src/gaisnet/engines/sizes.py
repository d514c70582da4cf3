"""Sizes of a run's messages, computed from the model's shape before any weights are loaded."""

import torch
from transformers import PretrainedConfig

from gaisnet.config import Config
from gaisnet.errors import ConfigError
from gaisnet.messages import ModelRelease
from gaisnet.models.families import Decoder, empty_decoder, empty_encoder, family_of
from gaisnet.models.foundation import read_shape
from gaisnet.models.int8 import to_empty_int8
from gaisnet.models.parts import Body
from gaisnet.models.release import release_encoder, release_model
from gaisnet.tiers.split.layout import Layout, with_family_defaults
from gaisnet.transport.codec import Codec


def check_sizes(config: Config) -> None:
    """Raise ``ConfigError`` if the model's release is longer than ``wire.max_transfer_bytes``."""
    shape = read_shape(config.model)
    release = planned_release(config, shape)
    limit, needed = config.wire.max_transfer_bytes, Codec(config.wire).pack(release).size_bytes
    if needed > limit:
        found = f"is {limit} bytes, but the release of '{config.model.foundation}' takes {needed}"
        do = f"set it to {needed} or more, or lower domain.precision, domain.keep_layers or model.dtype"
        raise ConfigError("wire.max_transfer_bytes", found, do)


def planned_release(config: Config, shape: PretrainedConfig) -> ModelRelease:
    """Return the release of a run on the meta device: every name, dtype and shape, without memory.

    If ``domain.keep_layers`` is a number, the first layers of the middle are dropped: others have the
    same sizes. Raises ``CutError`` or ``ConfigError`` if the configuration does not fit the model.
    """
    family = family_of(shape)
    config = with_family_defaults(config, family)
    layout = Layout(config, int(shape.num_hidden_layers), family)
    empty = empty_encoder(shape) if family.is_encoder else empty_decoder(shape)
    for part in vars(empty).values():
        if isinstance(part, torch.nn.Module):
            part.to(getattr(torch, config.model.dtype))
    kept = _kept(config, layout)
    int8 = [index for index in kept if index in layout.middle] if config.domain.precision == "int8" else []
    with torch.device("meta"):
        for index in int8:
            to_empty_int8(empty.layers[index])
    layers = {i: empty.layers[i] for i in kept if layout.first_cut <= i < layout.tail_start}
    body = Body(shape, layers, None)
    if isinstance(empty, Decoder):
        return release_model(empty, body, int8, layout.last_cut, layout.tail_start)
    return release_encoder(empty, body, int8, layout.last_cut)


def _kept(config: Config, layout: Layout) -> list[int]:
    keep, every = config.domain.keep_layers, list(range(layout.num_layers))
    if keep is None:
        return every
    if isinstance(keep, tuple):
        return sorted(keep)
    dropped = layout.middle.layers()[: layout.num_layers - keep]
    return [index for index in every if index not in dropped]
