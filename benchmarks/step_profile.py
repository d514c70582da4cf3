"""Where a step of GaisNet's fine-tuning spends its time, by kind of operation, at the edge and on the devices.

The steps are those of `gaisnet bench CONFIG` on the real model, all tiers in this process. Epochs are timed and
profiled in turn: torch's profiler says how long operations take but slows down what is between them. So a step is as
long as in epochs without it, and what is not in an operation that computes is the rest: the interpreter, views, memory,
autograd's own. On a machine that is shared set OMP_NUM_THREADS=1. Run: python benchmarks/step_profile.py
"""

import argparse
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")  # as the command has it
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from gaisnet.config import Config
from gaisnet.config.file import load_config
from gaisnet.data.devices import load_domains, public_text
from gaisnet.engines.local import NoPublishers, build_tiers
from gaisnet.learning.relay import TaskTemplate
from gaisnet.messages import Message
from gaisnet.models.foundation import load_foundation
from gaisnet.tiers.device.device import Device
from gaisnet.transport.ledger import Ledger

EDGE, DEVICE = "edge", "device"
FROZEN, ADAPTERS, ATTENTION = "frozen weights", "adapters, and other products", "attention"
MATRICES = (FROZEN, ADAPTERS, ATTENTION)
OPTIMIZER, REST = "AdamW", "the rest"
KINDS = {  # the first that has a word which begins a part of an operation's name
    FROZEN: ("mkldnn", "onednn"),
    ATTENTION: ("scaled",),
    ADAPTERS: ("addmm", "mm", "bmm"),
    "copies and casts": ("copy", "clone", "cat", "pad", "index", "fill", "zero"),
    "softmax": ("softmax", "log", "nll"),
    "sums and norms": ("sum", "mean", "linalg", "max", "all", "amax", "cumsum"),
    "elementwise": ("add", "mul", "sub", "div", "neg", "silu", "pow", "sqrt", "rsqrt", "abs", "eq", "ne", "lt", "gt",
                    "le", "ge", "cos", "sin", "clamp", "round", "isfinite", "bitwise", "exp"),
}  # fmt: skip


class Epochs:
    """A network's progress: the first epoch counts for nothing; then one is timed, one is profiled, and so on."""

    def __init__(self, num_epochs: int) -> None:
        self.num_timed = self.num_profiled = 0  # steps
        self.timed_s: dict[str, float] = defaultdict(float)  # by place; the edge's includes the devices'
        self.events: list[FunctionEvent] = []
        self._num_epochs = num_epochs
        self._epoch = 0
        self._profile: profile | None = None
        self._since = 0.0

    def __call__(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """See ``Progress``; of fine-tuning it is called after every step."""
        if stage != "fine_tune" or not figures:
            return
        self.spent(EDGE, time.perf_counter() - self._since)
        self.num_timed += self._timed
        self.num_profiled += self._profile is not None
        per_epoch = total // self._num_epochs
        if done % per_epoch == 0:
            self._compute_lock(done // per_epoch)
        self._since = time.perf_counter()

    def spent(self, place: str, seconds: float) -> None:
        """Count it, if this epoch is timed."""
        if self._timed:
            self.timed_s[place] += seconds

    @property
    def _timed(self) -> bool:
        return self._epoch % 2 == 1

    def _compute_lock(self, epoch: int) -> None:
        self._epoch = epoch
        if self._profile is not None:
            self._profile.stop()
            self.events += self._profile.events() or []
            self._profile = None
        if epoch and not self._timed and epoch < self._num_epochs:
            self._profile = profile(activities=[ProfilerActivity.CPU])
            self._profile.start()


def main() -> None:
    """Print a table of edge and devices, and the operations that take most."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--config", type=Path, default=Path("configs/bench.yaml"))
    arguments.add_argument("--examples", type=int, default=96)
    arguments.add_argument("--rounds", type=int, default=2, help="epochs that are timed, and as many that are profiled")
    arguments.add_argument("--most", type=int, default=20, help="operations to list")
    chosen = arguments.parse_args()
    num_epochs = 1 + 2 * chosen.rounds
    settings = {"data.train_examples": chosen.examples, "data.test_examples": 12, "fine_tune.local_epochs": num_epochs}
    config, epochs = load_config(chosen.config, [f"{k}={v}" for k, v in settings.items()]), Epochs(num_epochs)
    learn(config, epochs)
    console = Console(width=120)
    found = by_kind(epochs)
    console.print(kinds_table(found))
    step_ms = sum(found[EDGE].values()) + sum(found[DEVICE].values())
    products_ms = sum(found[place][kind] for place in found for kind in MATRICES)
    console.print(
        f"Matrix multiplication, attention included: {products_ms / step_ms:.0%} of a step of {step_ms:.0f} ms"
    )
    console.print(operations_table(epochs, chosen.most))


def learn(config: Config, epochs: Epochs) -> None:
    """One edge round of all tiers of ``config``, which has one domain."""
    ((name, domain),) = load_domains(config).items()
    shapes = {name: TaskTemplate(domain.template, domain.labels)}
    foundation, text = load_foundation(config.model), public_text(config.absorb)
    tiers = build_tiers(config, foundation, shapes, domain.devices, text, epochs, Ledger, NoPublishers())
    for device in tiers.devices.values():
        watch(device, epochs)
    tiers.network.install()
    tiers.network.evaluate()  # hands the devices their parts
    tiers.network.fine_tune()


def watch(device: Device, epochs: Epochs) -> None:
    """Let it be known what happens on a device."""
    handle = device.handle

    def watched(message: Message) -> Message:
        started = time.perf_counter()
        with record_function(DEVICE):
            answer = handle(message)
        epochs.spent(DEVICE, time.perf_counter() - started)
        return answer

    setattr(device, "handle", watched)  # noqa: B010


def by_kind(epochs: Epochs) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by place, edge and all of its devices, and by kind of operation."""
    found: dict[str, dict[str, float]] = {EDGE: defaultdict(float), DEVICE: defaultdict(float)}
    for event in epochs.events:
        place, kind = place_and_kind(event)
        if kind != REST:
            found[place][kind] += event.self_cpu_time_total / 1e3 / epochs.num_profiled
    device_ms = epochs.timed_s[DEVICE] * 1e3 / epochs.num_timed
    walls = {DEVICE: device_ms, EDGE: epochs.timed_s[EDGE] * 1e3 / epochs.num_timed - device_ms}
    for place, wall_ms in walls.items():
        found[place][REST] = wall_ms - sum(found[place].values())
    return found


def place_and_kind(event: FunctionEvent) -> tuple[str, str]:
    """Where an operation runs, and what it is."""
    above = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        above.append(parent.name)
        parent = parent.cpu_parent
    place = DEVICE if DEVICE in above else EDGE
    if any(name.startswith("Optimizer.step") for name in above[1:]):
        return place, OPTIMIZER
    words = event.name.replace("::", "_").split("_") if "::" in event.name else ()
    return place, next((kind for kind, known in KINDS.items() if set(known) & set(words)), REST)


def kinds_table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """A row per kind."""
    table = Table("", "edge, ms", "devices, ms", "share", title=f"A step, {torch.get_num_threads()} threads")
    total_ms = sum(sum(kinds.values()) for kinds in found.values())
    for kind in (*KINDS, OPTIMIZER, REST):
        edge_ms, device_ms = (found[place].get(kind, 0.0) for place in (EDGE, DEVICE))
        table.add_row(kind, f"{edge_ms:.1f}", f"{device_ms:.1f}", f"{(edge_ms + device_ms) / total_ms:.1%}")
    table.add_row("all", *(f"{sum(found[place].values()):.1f}" for place in (EDGE, DEVICE)), "")
    return table


def operations_table(epochs: Epochs, most: int) -> Table:
    """Those that take most."""
    took, calls = Counter[str](), Counter[str]()
    for event in epochs.events:
        took[event.name] += event.self_cpu_time_total
        calls[event.name] += 1
    table = Table("operation, by itself", "ms a step", "calls a step", "us a call")
    for name, us in took.most_common(most):
        table.add_row(
            name,
            f"{us / 1e3 / epochs.num_profiled:.1f}",
            f"{calls[name] / epochs.num_profiled:.0f}",
            f"{us / calls[name]:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
