"""Federated LoRA: every device holds the whole foundation model; the server averages adapters after each epoch.

FedAvg (McMahan et al., arXiv 1602.05629) on LoRA. The adapters cross a link as messages, which are counted.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from gaisnet.adapters.state import AdapterTensors
from gaisnet.data.examples import Tokens
from gaisnet.learning.fedavg import fedavg
from gaisnet.messages import AdapterRelease, AdapterUpdate
from gaisnet.research.bench.contenders.centralised import adapted
from gaisnet.research.bench.contenders.flops import Shape, of_whole_model
from gaisnet.research.bench.contenders.memory import peak_bytes
from gaisnet.research.bench.contenders.task import Result, Task, Watch, padded
from gaisnet.transport.codec import Codec

_DEVICE_SEEDS = 1_000


class Federated:
    """Devices train one after the other on this machine, each from the adapters that the server sent."""

    name = "federated"

    def device_flops(self, task: Task) -> float:
        """Return a device's operations: it has the whole model."""
        return of_whole_model(Shape.from_model_config(task.foundation_config()), 0, task.pooled)

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Return the peak memory of a single device, without averaging."""
        return peak_bytes(_learn, self, task.longest(), seed)

    def run(self, task: Task, seed: int) -> Result:
        """Train and score."""
        model, codec = adapted(task, late=False, seed=seed), Codec(task.config.wire)
        present: AdapterTensors = dict(get_peft_model_state_dict(model))
        losses: list[float] = []
        up = down = 0
        watch = Watch()
        for epoch in range(task.epochs):
            updates = []
            for number, examples in enumerate(task.train.values()):
                frame = codec.encode(AdapterRelease("domain", epoch, present))
                down += len(frame)
                set_peft_model_state_dict(model, codec.decode(frame).tensors)  # type: ignore[attr-defined]
                losses += self._epoch(model, task, examples, seed + _DEVICE_SEEDS * epoch + number)
                mine = dict(get_peft_model_state_dict(model))
                frame = codec.encode(AdapterUpdate(epoch + 1, epoch, len(examples), 1, losses[-1], (), mine))
                up += len(frame)
                updates.append((codec.decode(frame).tensors, len(examples)))  # type: ignore[attr-defined]
            present = fedavg(updates)
            set_peft_model_state_dict(model, present)
            watch.score(model, task.test)
        num_samples = len(task.pooled) * task.epochs
        return Result(watch.seconds, tuple(losses), num_samples, up, down, tuple(watch.curve))

    def _epoch(self, model: Any, task: Task, examples: Sequence[Tokens], seed: int) -> list[float]:
        """Make one pass over a device's examples; return its losses."""
        settings, losses = task.config.fine_tune, []
        parameters = [p for p in model.parameters() if p.requires_grad]
        decay = settings.weight_decay
        optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=decay, fused=True)
        model.train()
        (batches,) = task.batches(examples, 1, seed)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(**padded([examples[i] for i in batch])).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            losses.append(loss.item())
        return losses


def _learn(contender: Federated, task: Task, seed: int) -> None:
    """Train, as the work of a process."""
    contender.run(task, seed)
