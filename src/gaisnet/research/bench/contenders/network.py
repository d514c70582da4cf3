"""GaisNet as a contender: one edge and its split devices, with links inside one process.

To measure its memory, a device runs in a process of its own: messages recorded in a run are replayed to it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gaisnet.config import Config, DeviceSettings, EdgeSettings
from gaisnet.data.examples import DeviceData
from gaisnet.engines.local import build_network
from gaisnet.learning.relay import TaskTemplate
from gaisnet.models.foundation import load_foundation, load_tokenizer, with_context
from gaisnet.network import Network
from gaisnet.progress import Progress, silent
from gaisnet.research.bench.contenders.flops import Shape, of_split_device
from gaisnet.research.bench.contenders.memory import peak_bytes
from gaisnet.research.bench.contenders.task import Result, Task
from gaisnet.tiers.device.device import Device
from gaisnet.transport.codec import Codec
from gaisnet.transport.coded import coded
from gaisnet.transport.ledger import Direction, Ledger, LinkKind


class GaisNet:
    """Fine-tunes in one edge round for as many epochs as the other contenders.

    Args:
        data: Examples, by device.
        shape: Public description of the task.
        retention_text: Public text.
    """

    name = "gaisnet"

    def __init__(self, data: Mapping[str, DeviceData], shape: TaskTemplate, retention_text: str) -> None:
        self._data = data
        self._shape = shape
        self._retention_text = retention_text

    def device_flops(self, task: Task) -> float:
        """Return operations per sample of a device with the longest head; the head runs once for all epochs."""
        shape = Shape.from_model_config(task.foundation_config())
        return of_split_device(shape, _longest(task)[1].head_layers, task.pooled, task.epochs, cached=True)

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Return the peak memory of a device with the longest head, alone at its edge so that all rows are its own."""
        edge, settings = _longest(task)
        config = task.config.model_copy(
            update={"seed": seed, "edges": (edge.model_copy(update={"devices": (settings,)}),)}
        )
        data = self._data[settings.name]
        with tempfile.TemporaryDirectory(prefix="gaisnet-bench-") as folder:
            network = self._network(config, {settings.name: data}, new_ledger=lambda: _Overheard(Path(folder)))
            network.install()
            network.evaluate()
            network.fine_tune()
            del network
            return peak_bytes(_be_device, config, data, Path(folder))

    def run(self, task: Task, seed: int) -> Result:
        """Train and score; devices' heads and the cache of activations count in time and bytes."""
        config = task.config.model_copy(update={"seed": seed})
        losses: list[float] = []

        def note(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if stage == "fine_tune" and "loss" in figures:
                losses.append(figures["loss"])

        network = self._network(config, self._data, progress=note)
        network.install()
        network.evaluate()  # sends devices their parts
        before = network.traffic()["device_edge"]
        started = time.perf_counter()
        network.fine_tune()
        seconds = time.perf_counter() - started
        after = network.traffic()["device_edge"]
        (report,) = network.evaluate().domain.values()
        num_samples = len(task.pooled) * task.epochs
        accuracy = report.num_correct / report.num_examples
        up, down = after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down
        return Result(seconds, tuple(losses), num_samples, up, down, ((seconds, accuracy),))

    def _network(
        self,
        config: Config,
        data: Mapping[str, DeviceData],
        progress: Progress = silent,
        new_ledger: Callable[[], Ledger] = Ledger,
    ) -> Network:
        shapes = {edge.domain: self._shape for edge in config.edges}
        return build_network(
            config, load_foundation(config.model), shapes, data, self._retention_text, progress, new_ledger
        )


def _longest(task: Task) -> tuple[EdgeSettings, DeviceSettings]:
    """Return the device with the longest head, and its edge."""
    return max(task.config.each_device(), key=lambda pair: pair[1].head_layers)


class _Overheard(Ledger):
    """A ledger of an edge with one device that records messages to the device as files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._count = 0

    def record(self, kind: LinkKind, direction: Direction, frame: bytes) -> None:
        """Count one frame, and store it if it goes down to the device."""
        super().record(kind, direction, frame)
        if (kind, direction) == ("device_edge", "down"):
            (self._folder / f"{self._count:06d}").write_bytes(frame)
            self._count += 1


def _be_device(config: Config, data: DeviceData, told: Path) -> None:
    """Act as the one device of ``config``, as the work of a process: replay a folder's messages in order."""
    ((_, settings),) = config.each_device()
    codec = Codec(config.wire)
    answer = coded(Device(settings, with_context(config), load_tokenizer(config.model), data), codec)
    for file in sorted(told.iterdir()):
        answer("edge", file.read_bytes())
