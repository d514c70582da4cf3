"""What the devices of one machine hold together: parts of the model that never change are there once, however many."""

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
    """Of a device, or of all whose cut and release are the same; frozen, and only ever called."""

    release: ModelRelease  # its tensors are those of the parts
    layout: Layout
    head: Head | EncoderHead
    tail: Tail | None  # where the body goes to the end of the model, there is none

    def decoder_parts(self) -> tuple[Head, Tail]:
        """To write with. Raises ``SessionRefused`` where the model is an encoder."""
        if not isinstance(self.head, Head) or self.tail is None:
            found = "the foundation model is an encoder, which tells classes apart and writes no text"
            raise SessionRefused("an answer", found, "ask a run of a decoder")
        return self.head, self.tail


class SharedWeights:
    """Gives devices their parts. Nothing is kept that no device holds any more.

    A device takes its release off a link, as bytes of its own; a tensor of it that another one holds already, number
    by number, is dropped for that one. Devices with other cuts so share embeddings and layers, those with the same cut
    whole parts.

    Args:
        config: The run's configuration.
        compute_lock: Of the machine.
    """

    def __init__(self, config: Config, compute_lock: ComputeLock) -> None:
        self._config = config
        self._compute_lock = compute_lock
        self._tensors: WeakValueDictionary[str, Tensor] = WeakValueDictionary()  # the latest of each name
        self._parts: WeakValueDictionary[tuple[object, ...], DeviceWeights] = WeakValueDictionary()

    def get_device_weights(self, release: ModelRelease, device: DeviceSettings) -> DeviceWeights:
        """Head and tail of a device. Raises ``ModelError`` or ``CutError``."""
        shared = {name: self._shared(name, tensor) for name, tensor in release.tensors.items()}
        said = repr(replace(release, tensors={}))
        ids = frozenset((name, id(tensor)) for name, tensor in shared.items())  # parts hold them, so ids stay theirs
        key = (device.head_layers, said, ids)
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
