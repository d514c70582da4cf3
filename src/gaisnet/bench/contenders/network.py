"""GaisNet itself, as a contender: one edge and its split devices, with the links of one process."""

import time
from collections.abc import Mapping

from gaisnet.bench.contenders.task import Result, Task
from gaisnet.engines.local import build_network
from gaisnet.models.foundation import load_foundation
from gaisnet.relay.downward import TaskShape
from gaisnet.tiers.examples import DeviceData


class GaisNet:
    """Fine-tunes in one edge round, as far as the other contenders do in all their epochs.

    Args:
        data: Examples, by device.
        shape: What is public about the task.
        retention_text: Public text.
    """

    name = "gaisnet"

    def __init__(self, data: Mapping[str, DeviceData], shape: TaskShape, retention_text: str) -> None:
        self._data = data
        self._shape = shape
        self._retention_text = retention_text

    def run(self, task: Task, seed: int) -> Result:
        """Learn and score; devices' heads and the cache of activations are part of the time, and of the bytes."""
        config = task.config.model_copy(update={"seed": seed})
        (edge,) = config.edges
        losses: list[float] = []

        def note(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
            if stage == "fine_tune" and "loss" in figures:
                losses.append(figures["loss"])

        foundation = load_foundation(config.model)
        network = build_network(
            config, foundation, {edge.domain: self._shape}, self._data, self._retention_text, progress=note
        )
        network.install()
        network.evaluate()  # hands the devices their parts
        before = network.traffic()["device_edge"]
        started = time.perf_counter()
        network.fine_tune()
        seconds = time.perf_counter() - started
        after = network.traffic()["device_edge"]
        report = network.evaluate().domain[edge.domain]
        num_samples = len(task.pooled) * task.epochs
        accuracy = report.num_correct / report.num_examples
        up, down = after.bytes_up - before.bytes_up, after.bytes_down - before.bytes_down
        return Result(seconds, tuple(losses), num_samples, up, down, accuracy)
