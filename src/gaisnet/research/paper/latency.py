"""Latency of a split inference: one image through device, link and edge, each part timed by itself.

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
    """The link between a device and its edge, and the device's relative speed.

    Attributes:
        mbit_per_s: Bandwidth in each direction.
        round_trip_s: Round trip of an empty message.
        slower: Factor by which the device is slower than the edge.
    """

    mbit_per_s: float
    round_trip_s: float = 0.010
    slower: float = 4.0

    def seconds(self, at_device_s: float, at_edge_s: float, size_bytes: float) -> float:
        """Return the seconds from an image to its logits at the device; without a crossing there is no round trip.

        Args:
            at_device_s: Seconds of the device's work, measured on this machine.
            at_edge_s: Seconds of the edge's work.
            size_bytes: Bytes of all frames, both ways.
        """
        crossing_s = self.round_trip_s + 8e-6 * size_bytes / self.mbit_per_s if size_bytes else 0.0
        return self.slower * at_device_s + crossing_s + at_edge_s


@dataclass(frozen=True)
class Crossing:
    """Both frames of an inference in one tensor code: seconds to encode and decode on this machine, and bytes."""

    at_device_s: float
    at_edge_s: float
    up_bytes: int
    down_bytes: int


@dataclass(frozen=True)
class Cut:
    """A classifier cut in two, with one image.

    Attributes:
        head: The device's part.
        body: The edge's part.
        pixels: [1, channels, height, width].
        repeats: Number of runs of each part; the median counts.
    """

    head: EncoderHead
    body: EncoderBody
    pixels: Tensor
    repeats: int

    @classmethod
    def after(cls, model: ViTForImageClassification, num_layers: int, pixels: Tensor, repeats: int) -> "Cut":
        """Cut after ``num_layers`` layers; both parts are frozen, as on devices and edges. Raises ``CutError``."""
        encoder = Encoder(model.requires_grad_(False).eval())
        head, body = cut_encoder(encoder, CutLayers(num_layers))
        freeze_linears(*encoder.layers, model.classifier)
        return cls(head, body, pixels, repeats)

    @torch.no_grad()
    def compute(self) -> tuple[float, float, float]:
        """Time the head, the body's layers, and the end of the model with its classifier, in seconds."""
        head_s, hidden_BTD = self._timed(lambda: self.head(self.pixels))
        body_s, rows_BD = self._timed(lambda: self.body.run(hidden_BTD, pick=first_rows))
        classifier_s, _ = self._timed(lambda: self.body.classify(rows_BD))
        return head_s, body_s, classifier_s

    @torch.no_grad()
    def crossing(self, code: TensorCode) -> Crossing:
        """Encode and decode smashed data (up) and logits (down) with the network's codec."""
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
