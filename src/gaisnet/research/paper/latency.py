"""Where the time of a split inference goes: one image through device, link and edge, each part measured by itself.

Shape legend: B sequences (1), T positions, D hidden size, C classes.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor
from transformers import ViTForImageClassification

from gaisnet.config import TensorCode, WireSettings
from gaisnet.messages import BodyOutput, SmashedData
from gaisnet.models.encoders import EncoderBody, EncoderHead, cut_encoder, first_rows
from gaisnet.models.families import Encoder
from gaisnet.models.frozen import freeze_linears
from gaisnet.models.parts import CutLayers
from gaisnet.transport.codec import Codec

_WARM_UP = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """Between a device and its edge, and how much slower than the edge the device computes.

    Attributes:
        mbit_per_s: Each way.
        round_trip_s: Of a message without a length.
        slower: What the edge does in a second, the device does in so many.
    """

    mbit_per_s: float
    round_trip_s: float = 0.010
    slower: float = 4.0

    def seconds(self, at_device_s: float, at_edge_s: float, size_bytes: float) -> float:
        """From an image to its logits at the device; where nothing crosses, there is no round trip either.

        Args:
            at_device_s: Work of the device, as it was measured where the edge is.
            at_edge_s: Work of the edge.
            size_bytes: Of all frames, both ways.
        """
        crossing_s = self.round_trip_s + 8e-6 * size_bytes / self.mbit_per_s if size_bytes else 0.0
        return self.slower * at_device_s + crossing_s + at_edge_s


@dataclass(frozen=True)
class Crossing:
    """Both frames of an inference in one code: seconds to write and to read them on this machine, and bytes."""

    at_device_s: float
    at_edge_s: float
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Cut:
    """A classifier cut in two, and what is on either side for one image.

    Attributes:
        head: At the device.
        body: At the edge.
        pixels: [1, channels, height, width].
        repeats: Every part is run so often; what counts is the median.
    """

    head: EncoderHead
    body: EncoderBody
    pixels: Tensor
    repeats: int

    @classmethod
    def of(cls, model: ViTForImageClassification, num_layers: int, pixels: Tensor, repeats: int) -> "Cut":
        """After ``num_layers``; frozen, as devices and edges hold their parts. Raises ``CutError``."""
        encoder = Encoder(model.requires_grad_(False).eval())
        head, body = cut_encoder(encoder, CutLayers(num_layers))
        freeze_linears(*encoder.layers, model.classifier)
        return cls(head, body, pixels, repeats)

    @torch.no_grad()
    def compute(self) -> tuple[float, float, float]:
        """Seconds of the head, of the body's layers, and of the end of the model with its classifier."""
        head_s, hidden_BTD = self._timed(lambda: self.head(self.pixels))
        body_s, rows_BD = self._timed(lambda: self.body.run(hidden_BTD, pick=first_rows))
        classifier_s, _ = self._timed(lambda: self.body.classify(rows_BD))
        return head_s, body_s, classifier_s

    @torch.no_grad()
    def crossing(self, code: TensorCode) -> Crossing:
        """Smashed data up and logits down, written and read by the network's codec."""
        codec = Codec(WireSettings(smashed=code, body_output=code))
        hidden_BTD = self.head(self.pixels)
        logits_BC = self.body.classify(self.body.run(hidden_BTD, pick=first_rows))
        one_E = torch.ones(1, dtype=torch.int32)
        num_layers, lengths_E = len(self.head.stack.indices), hidden_BTD.shape[1] * one_E
        smashed = SmashedData("device", "test", num_layers, lengths_E, one_E, hidden_BTD[0])
        output = BodyOutput("test", 0, 1, 0 * one_E, logits_BC)
        up_write_s, up = self._timed(lambda: codec.encode(smashed))
        up_read_s, _ = self._timed(lambda: codec.decode(up))
        down_write_s, down = self._timed(lambda: codec.encode(output))
        down_read_s, _ = self._timed(lambda: codec.decode(down))
        return Crossing(up_write_s + down_read_s, up_read_s + down_write_s, len(up), len(down))

    def _timed(self, run: Callable[[], T]) -> tuple[float, T]:
        for _ in range(_WARM_UP):
            run()
        seconds = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            result = run()
            seconds.append(time.perf_counter() - started)
        return median(seconds), result
