"""Centralised LoRA on pooled data the usual way: transformers' Trainer and peft, none of our code.

Its batches hold examples of similar length, so it pads no more than the others.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from gaisnet.data.examples import Tokens
from gaisnet.research.bench.contenders.flops import Shape, of_whole_model
from gaisnet.research.bench.contenders.memory import peak_bytes
from gaisnet.research.bench.contenders.task import Result, Task, Watch, padded

Collate = Callable[[Sequence[Tokens]], dict[str, Any]]


class _Epochs:
    """A sampler of batches with another order in every epoch."""

    def __init__(self, epochs: Sequence[list[list[int]]]) -> None:
        self._epochs = list(epochs)
        self._next = 0

    def __len__(self) -> int:
        return len(self._epochs[0])

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._epochs[self._next]
        self._next = (self._next + 1) % len(self._epochs)
        return iter(batches)


class _Trainer(Trainer):
    """A Trainer that takes the given batches and keeps every loss."""

    def __init__(
        self, model: Any, arguments: TrainingArguments, examples: list[Tokens], epochs: _Epochs, collate: Collate
    ) -> None:
        super().__init__(model, arguments)
        self.losses: list[float] = []
        self._loader: Any = DataLoader(examples, batch_sampler=epochs, collate_fn=collate)  # type: ignore[arg-type]

    def get_train_dataloader(self) -> Any:
        return self._loader

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class _Scores(TrainerCallback):
    """Scores the model after every epoch."""

    def __init__(self, examples: Sequence[Tokens]) -> None:
        self._examples = examples
        self.watch = Watch()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch = Watch()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.score(kwargs["model"], self._examples)


class Centralised:
    """LoRA on every linear module of the layers from ``first_layer`` on.

    Args:
        name: The contender's name.
        late: Adapt only the layers that GaisNet adapts, instead of all.
    """

    def __init__(self, name: str, late: bool) -> None:
        self.name = name
        self._late = late

    def device_flops(self, task: Task) -> float:
        """Return the operations of the machine that pools the examples; there is no device."""
        return of_whole_model(
            Shape.from_model_config(task.foundation_config()), first_layer(task, self._late), task.pooled
        )

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Return the peak memory of that machine."""
        return peak_bytes(_learn, self, task.longest(), seed)

    def run(self, task: Task, seed: int) -> Result:
        """Train and score."""
        return train(adapted(task, self._late, seed), task, seed)


def train(
    model: Any,
    task: Task,
    seed: int,
    schedule: Literal["constant", "linear"] = "constant",
    collate: Collate = padded,
) -> Result:
    """Train the trainable parameters of ``model`` on the pooled examples with transformers' Trainer, and score it.

    ``schedule`` names the learning rate schedule; 'linear' falls to zero. ``collate`` builds a batch from examples.
    """
    examples, settings = task.pooled, task.config.fine_tune
    epochs = _Epochs(list(task.batches(examples, task.epochs, seed)))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=task.epochs,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type=schedule,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=task.config.model.device == "cpu",
            seed=seed,
        )
        trainer = _Trainer(model, arguments, examples, epochs, collate)
        scores = _Scores(task.test)
        trainer.add_callback(scores)
        trainer.remove_callback(PrinterCallback)  # it would print into the progress display
        trainer.train()
    num_samples = len(examples) * task.epochs
    return Result(scores.watch.seconds, tuple(trainer.losses), num_samples, 0, 0, tuple(scores.watch.curve))


def first_layer(task: Task, late: bool) -> int:
    """First trained layer."""
    return task.config.adapters.first_layer if late else 0


def _learn(contender: Centralised, task: Task, seed: int) -> None:
    """Train, as the work of a process."""
    contender.run(task, seed)


def adapted(task: Task, late: bool, seed: int) -> Any:
    """Return the foundation model with fresh peft adapters; only these are trained."""
    return with_adapters(task.foundation().model, task, late, seed)


def with_adapters(model: Any, task: Task, late: bool, seed: int) -> Any:
    """Add fresh peft adapters to a model; only these are trained."""
    torch.manual_seed(seed)
    spec = task.lora(first_layer(task, late), model.config.num_hidden_layers)
    return get_peft_model(model, spec.peft_config())
