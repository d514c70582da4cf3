"""Plain U-shaped split learning, as in SplitLoRA (arXiv 2407.00952) and SplitFed (arXiv 2004.12088).

The device has the head and the tail, the server the layers between. In every step all positions cross in float32: the
head's output up, the body's output down, its gradient up. Nothing is cached between epochs.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from gaisnet.adapters.tuning import activate, add_adapter, trainable
from gaisnet.config import WireSettings
from gaisnet.data.examples import Tokens
from gaisnet.messages import BodyOutput, BodyOutputGrad, Message, ModelRelease, SmashedData
from gaisnet.models.parts import Body, CutLayers, Head, Tail, cut_decoder
from gaisnet.models.release import ReleasedModel, release_model, restrict
from gaisnet.research.bench.contenders.flops import Shape, of_split_device
from gaisnet.research.bench.contenders.memory import peak_bytes
from gaisnet.research.bench.contenders.task import Result, Task, Watch
from gaisnet.transport.codec import Codec

_WIRE = WireSettings(smashed="float32", body_output="float32", gradient="float32")
_ADAPTER = "domain"
M = TypeVar("M", bound=Message)


class PlainSplit:
    """One batch at a time from all devices' examples; adapters on the server's late layers, as in GaisNet."""

    name = "split_plain"

    def device_flops(self, task: Task) -> float:
        """Return operations per sample of a device with the longest head."""
        shape = Shape.from_model_config(task.foundation_config())
        return of_split_device(shape, _head_layers(task), task.pooled, task.epochs, cached=False)

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Return the peak memory of a device with the longest head, in a process of its own."""
        decoder, cut = task.foundation().decoder, CutLayers(_head_layers(task))
        release = release_model(decoder, cut_decoder(decoder, cut)[1], (), cut.head, len(decoder.layers))
        with tempfile.NamedTemporaryFile(prefix="gaisnet-bench-") as file:
            file.write(Codec(_WIRE).encode(restrict(release, range(cut.head))))
            file.flush()
            return peak_bytes(_be_device, task.longest(), cut, seed, file.name)

    def run(self, task: Task, seed: int) -> Result:
        """Train and score."""
        foundation = task.foundation()
        cut = CutLayers(_head_layers(task))
        head, body, tail = cut_decoder(foundation.decoder, cut)
        add_adapter(body, _ADAPTER, task.lora(task.config.adapters.first_layer, len(foundation.decoder.layers)), seed)
        activate(body, (_ADAPTER,))
        parameters, settings = trainable(body, _ADAPTER), task.config.fine_tune
        decay = settings.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=decay, fused=True)
        wire, examples = _Wire(), task.pooled
        losses: list[float] = []
        device = PlainDevice(head, tail)
        watch = Watch()
        for batches in task.batches(examples, task.epochs, seed):
            for batch in batches:
                optimizer.zero_grad()
                losses.append(_step(device, body, [examples[i] for i in batch], wire, len(losses)))
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
                optimizer.step()
            watch.score(foundation.model, task.test)
        num_samples, up, down = len(examples) * task.epochs, wire.up, wire.down
        return Result(watch.seconds, tuple(losses), num_samples, up, down, tuple(watch.curve))


class _Wire:
    """Encodes and decodes messages, and counts their bytes."""

    def __init__(self) -> None:
        self._codec = Codec(_WIRE)
        self.up = self.down = 0

    def to_server(self, message: M) -> M:
        """Send messages from the devices up."""
        frame = self._codec.encode(message)
        self.up += len(frame)
        return cast(M, self._codec.decode(frame))

    def to_device(self, message: M) -> M:
        """Send messages from the server down."""
        frame = self._codec.encode(message)
        self.down += len(frame)
        return cast(M, self._codec.decode(frame))


class PlainDevice:
    """Head, tail and labels. Devices of a batch do the same work side by side; here one does it for all."""

    def __init__(self, head: Head, tail: Tail) -> None:
        self._head = head
        self._tail = tail

    @torch.no_grad()
    def smash(self, examples: Sequence[Tokens]) -> SmashedData:
        """Return the head's output at all positions of a batch."""
        ids_BT = pad_sequence([torch.tensor(t.input_ids) for t in examples], batch_first=True)
        hidden_BTD = self._head(ids_BT)
        lengths, num_labels = [len(t.input_ids) for t in examples], [len(t.label_ids) for t in examples]
        rows_ND = _real_rows(hidden_BTD, lengths)
        lengths_E, num_labels_E = (torch.tensor(each, dtype=torch.int32) for each in (lengths, num_labels))
        return SmashedData("devices", "train", len(self._head.stack.indices), lengths_E, num_labels_E, rows_ND)

    def gradient(self, output: BodyOutput, examples: Sequence[Tokens]) -> BodyOutputGrad:
        """Return the gradient of the mean loss over the batch's label tokens, at all positions."""
        rows_ND = output.rows_ND.requires_grad_()
        ends = torch.tensor([len(t.input_ids) for t in examples]).cumsum(0).tolist()
        at = [n for end, t in zip(ends, examples, strict=True) for n in range(end - len(t.label_ids), end)]
        labels_N = torch.tensor([label for t in examples for label in t.label_ids])
        loss = F.cross_entropy(self._tail.logits(rows_ND[at]), labels_N)
        (grad_ND,) = torch.autograd.grad(loss, rows_ND)
        return BodyOutputGrad(output.step, loss.item() * len(labels_N), grad_ND)


def _real_rows(hidden_BTD: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the rows of a padded batch without padding, [N, D]."""
    longest = hidden_BTD.shape[1]
    rows = [b * longest + t for b, n in enumerate(lengths) for t in range(n)]
    # All at once: slicing per sequence would make a batch of zero gradients per sequence.
    return hidden_BTD.flatten(0, 1).index_select(0, torch.tensor(rows))


def _head_layers(task: Task) -> int:
    return max(device.head_layers for _, device in task.config.each_device())


def _be_device(task: Task, cut: CutLayers, seed: int, release: str) -> None:
    """Act as the device, as the work of a process: load head and tail from a file, run one epoch of batches."""
    codec, examples = Codec(_WIRE), task.pooled
    model = ReleasedModel(cast(ModelRelease, codec.decode(Path(release).read_bytes())))
    head = model.head(cut)
    device = PlainDevice(head, model.tail(cut, head))
    del model
    for batches in task.batches(examples, 1, seed):
        for batch in batches:
            some = [examples[i] for i in batch]
            smashed = cast(SmashedData, codec.decode(codec.encode(device.smash(some))))
            numbers = torch.arange(len(some), dtype=torch.int32)  # a body's output has the shape of its input
            output = BodyOutput("train", 0, int(smashed.num_labels_E.sum()), numbers, smashed.hidden_ND)
            codec.encode(device.gradient(cast(BodyOutput, codec.decode(codec.encode(output))), some))


def _step(device: PlainDevice, body: Body, examples: Sequence[Tokens], wire: _Wire, step: int) -> float:
    """Run a batch forward and backward, leaving gradients on the adapter; return its loss."""
    smashed = wire.to_server(device.smash(examples))
    lengths, num_labels = smashed.lengths_E.tolist(), smashed.num_labels_E.tolist()
    hidden_BTD = pad_sequence(list(smashed.hidden_ND.split(lengths)), batch_first=True)
    rows_ND = _real_rows(body(hidden_BTD), lengths)
    numbers = torch.arange(len(examples), dtype=torch.int32)
    output = wire.to_device(BodyOutput("train", step, sum(num_labels), numbers, rows_ND.detach()))
    reply = wire.to_server(device.gradient(output, examples))
    rows_ND.backward(reply.grad_ND)
    return float(reply.loss_sum / sum(num_labels))
