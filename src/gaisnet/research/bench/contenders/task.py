"""The task of all contenders: one model, the same examples, steps and settings."""

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PretrainedConfig

from gaisnet.adapters.tuning import LoraSpec
from gaisnet.config import Config
from gaisnet.data.devices import DomainData
from gaisnet.data.examples import Tokens, tokenize
from gaisnet.models.families import LLAMA
from gaisnet.models.foundation import Foundation, load_foundation, load_tokenizer, read_config, with_context
from gaisnet.models.parts import CACHE
from gaisnet.models.ragged import by_length, shuffled_batches
from gaisnet.models.tokenization import ends_of

_IGNORED = -100  # label that transformers' loss ignores
_SCORED = 32
_LONGEST = 3  # number of batches


@dataclass(frozen=True)
class Task:
    """Fine-tuning on the examples of several devices.

    Attributes:
        config: GaisNet's settings; batch size, epochs, learning rate and LoRA shape hold for all contenders.
        train: Training examples, by device.
        test: Test examples.
    """

    config: Config
    train: Mapping[str, Sequence[Tokens]]
    test: Sequence[Tokens]

    @classmethod
    def load(cls, config: Config, data: DomainData) -> "Task":
        """Load the examples of a domain's devices. Raises ``DataError``."""
        tokenizer, context = load_tokenizer(config.model), with_context(config).model.most_tokens
        train = {name: tokenize(mine.train, tokenizer, context, name) for name, mine in data.devices.items()}
        test = [t for name, mine in data.devices.items() for t in tokenize(mine.test, tokenizer, context, name)]
        return cls(config, train, test)

    @property
    def pooled(self) -> list[Tokens]:
        """Return all examples, device after device."""
        return [tokens for mine in self.train.values() for tokens in mine]

    @property
    def epochs(self) -> int:
        """Number of passes over the examples."""
        return self.config.fine_tune.passes_in_round

    def longest(self) -> "Task":
        """Return a task with a few batches of the longest examples on one device, once: the peak of memory."""
        some = sorted(self.pooled, key=lambda t: -len(t.input_ids))[: _LONGEST * self.config.fine_tune.batch_size]
        settings = self.config.fine_tune.model_copy(update={"local_epochs": 1})
        return Task(self.config.model_copy(update={"fine_tune": settings}), {"one": some}, ())

    def foundation_config(self) -> PretrainedConfig:
        """Load the foundation model's configuration, without weights."""
        return read_config(self.config.model)

    def foundation(self) -> Foundation:
        """Load the foundation model afresh, as transformers does."""
        return load_foundation(self.config.model, plain=True)

    def lora(self, first_layer: int, num_layers: int) -> LoraSpec:
        """Describe adapters on all layers from ``first_layer`` on."""
        settings = self.config.adapters
        targets = settings.targets or LLAMA.targets
        return LoraSpec(settings.rank, settings.alpha, targets, tuple(range(first_layer, num_layers)))

    def batches(self, examples: Sequence[Tokens], epochs: int, seed: int) -> Iterator[list[list[int]]]:
        """Return the batches of each epoch, as indices into ``examples``: similar lengths, random order."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [len(tokens.input_ids) for tokens in examples]
        for _ in range(epochs):
            yield list(shuffled_batches(lengths, self.config.fine_tune.batch_size, generator))


@dataclass(frozen=True)
class Result:
    """The result of training."""

    seconds: float  # all epochs, without loading the model
    losses: tuple[float, ...]  # mean over label tokens, per step
    num_samples: int  # examples times epochs
    bytes_up: int  # all devices
    bytes_down: int
    curve: tuple[tuple[float, float], ...]  # seconds of training so far, and the accuracy then; at least at the end

    @property
    def accuracy(self) -> float:
        """Return the final accuracy: the share of test examples that greedy decoding writes exactly."""
        return self.curve[-1][1]

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the seconds of training until an accuracy was first reached; None if never."""
        return next((seconds for seconds, found in self.curve if found >= accuracy), None)

    @property
    def samples_per_s(self) -> float:
        """Examples per second."""
        return self.num_samples / self.seconds

    @property
    def bytes_per_sample(self) -> float:
        """Bytes per sample on the devices' links, both ways."""
        return (self.bytes_up + self.bytes_down) / self.num_samples


class Watch:
    """Stopwatch of training that excludes scoring, with the accuracy after each epoch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []
        self._started = time.perf_counter()

    def score(self, model: Any, examples: Sequence[Tokens]) -> None:
        """Score while the watch stands still."""
        self.seconds += time.perf_counter() - self._started
        was_training = model.training
        model.eval()
        self.curve.append((self.seconds, accuracy(model, examples)))
        model.train(was_training)
        self._started = time.perf_counter()


class Contender(Protocol):
    """A way to fine-tune."""

    name: str

    def run(self, task: Task, seed: int) -> Result:
        """Train and score. Raises a ``GaisnetError``."""

    def device_flops(self, task: Task) -> float:
        """Return operations per sample and epoch of the machine that holds the examples."""

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Return that machine's peak memory in a process of its own, interpreter and libraries included."""


def padded(examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """Collate a batch for transformers' causal models: int64 [B, T], right-padded, labels at answers only."""
    ids = [torch.tensor([*t.input_ids, t.label_ids[-1]]) for t in examples]
    labels = [torch.tensor([_IGNORED] * (len(t.input_ids) + 1 - len(t.label_ids)) + [*t.label_ids]) for t in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }


def answered(examples: Sequence[Tokens]) -> dict[str, Any]:
    """Collate the same batch, but compute logits from the first answer on only: vocabularies are large.

    Labels [B, K] are those of the last K positions; the first of these is ignored.
    """
    batch: dict[str, Any] = dict(padded(examples))
    labels_BT = batch["labels"]
    num_last = labels_BT.shape[1] - int((labels_BT != _IGNORED).any(0).nonzero()[0]) + 1
    return {**batch, "labels": labels_BT[:, -num_last:], "logits_to_keep": num_last}


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[Tokens], shown: Sequence[int] = ()) -> float:
    """Return the share of examples whose every label is the most likely token given the previous ones; nan for none.

    If several tokens end an answer, any of them counts as any other.

    ``shown``: tokens that stand before every example. The model reads them once.
    """
    if not examples:
        return math.nan
    right, device = 0, next(model.parameters()).device
    behind = _Behind(model, shown) if shown else None
    ends = torch.tensor(ends_of(model.config), dtype=torch.int64, device=device)
    for batch in by_length([len(t.input_ids) for t in examples], _SCORED):
        inputs = answered([examples[i] for i in batch])
        labels_BK = inputs.pop("labels")[:, 1:].to(device)
        placed = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in inputs.items()}
        logits_BKV = model(**(behind.put(placed) if behind else placed)).logits[:, :-1]
        written_BK = logits_BKV.argmax(-1)
        both_end_BK = torch.isin(written_BK, ends) & torch.isin(labels_BK, ends)
        hits_BK = (written_BK == labels_BK) | both_end_BK | (labels_BK == _IGNORED)
        right += int(hits_BK.all(1).sum())
    return right / len(examples)


class _Behind:
    """Puts batches after tokens that ``model`` has already read; their keys and values are kept."""

    def __init__(self, model: Any, shown: Sequence[int]) -> None:
        ids = torch.tensor([shown], device=next(model.parameters()).device)
        self._read = DynamicCache()
        model(ids, logits_to_keep=1, **{CACHE: self._read})
        self._num_shown = len(shown)

    def put(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the same batch, preceded by the tokens already read."""
        mask_BT, read = (
            inputs["attention_mask"],
            copy.deepcopy(self._read),
        )  # the model extends the cache that it is given
        read.batch_repeat_interleave(len(mask_BT))
        before = mask_BT.new_ones(len(mask_BT), self._num_shown)
        return {**inputs, "attention_mask": torch.cat([before, mask_BT], dim=1), CACHE: read}
