"""Weights that all devices of a machine share: frozen parts of the model are in memory once."""

from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from gaisnet.compute_lock import ComputeLock
from gaisnet.config import Config, DeviceSettings
from gaisnet.errors import SessionRefused
from gaisnet.messages import ModelRelease
from gaisnet.models.encoders import EncoderHead
from gaisnet.models.parts import Head, Tail
from gaisnet.models.preemption import pause_within
from gaisnet.models.release import released
from gaisnet.tiers.split.layout import Layout


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """Head and tail of all devices with the same cut and release; frozen."""

    release: ModelRelease  # shares its tensors with head and tail
    layout: Layout
    head: Head | EncoderHead
    tail: Tail | None  # None where the body goes to the end of the model

    def decoder_parts(self) -> tuple[Head, Tail]:
        """Return head and tail of a decoder. Raises ``SessionRefused`` for an encoder."""
        if not isinstance(self.head, Head) or self.tail is None:
            found = "the foundation model is an encoder, which tells classes apart and writes no text"
            raise SessionRefused("an answer", found, "ask a run of a decoder")
        return self.head, self.tail


class SharedWeights:
    """Builds the weights of devices from releases, and shares equal tensors between them.

    A release arrives as a copy of its own. Tensors that equal those of another device are replaced by these, so devices
    share embeddings and layers, and with the same cut whole parts. Unused tensors are freed.

    Args:
        config: The run's configuration.
        compute_lock: The machine's lock.
    """

    def __init__(self, config: Config, compute_lock: ComputeLock) -> None:
        self._config = config
        self._compute_lock = compute_lock
        self._tensors: WeakValueDictionary[str, Tensor] = WeakValueDictionary()  # latest tensor of each name
        self._parts: WeakValueDictionary[tuple[object, ...], DeviceWeights] = WeakValueDictionary()

    def get_device_weights(self, release: ModelRelease, device: DeviceSettings) -> DeviceWeights:
        """Return head and tail of a device. Raises ``ModelError`` or ``CutError``."""
        shared = {name: self._shared(name, tensor) for name, tensor in release.tensors.items()}
        description = repr(replace(release, tensors={}))
        ids = frozenset(
            (name, id(tensor)) for name, tensor in shared.items()
        )  # parts keep them alive, so ids stay valid
        key = (device.head_layers, description, ids)
        parts = self._parts.get(key)
        if parts is None:
            self._parts[key] = parts = self._build(replace(release, tensors=shared), device)
        return parts

    def _shared(self, name: str, tensor: Tensor) -> Tensor:
        held = self._tensors.get(name)
        if held is not None and held.dtype == tensor.dtype and torch.equal(held, tensor):
            return held
        self._tensors[name] = tensor
        return tensor

    def _build(self, release: ModelRelease, device: DeviceSettings) -> DeviceWeights:
        model = released(release)
        layout = Layout(self._config, model.num_layers, model.family)
        head, tail = model.outer(layout.device_cut(device))
        for part in (head, *([tail] if tail else [])):
            pause_within(part.stack.layers.values(), self._compute_lock.pause)
        return DeviceWeights(release, layout, head, tail)
