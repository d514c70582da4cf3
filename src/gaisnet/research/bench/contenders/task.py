"""What all contenders learn, and what is asked of them: one model, the same examples, steps and settings."""

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

_IGNORED = -100  # a label that transformers' loss passes over
_SCORED = 32
_LONGEST = 3  # batches


@dataclass(frozen=True)
class Task:
    """Fine-tuning on the examples of several devices.

    Attributes:
        config: Settings of GaisNet; batch size, epochs, learning rate and LoRA's shape are those of all.
        train: Examples to learn from, by device.
        test: Examples that nobody learns from.
    """

    config: Config
    train: Mapping[str, Sequence[Tokens]]
    test: Sequence[Tokens]

    @classmethod
    def of(cls, config: Config, data: DomainData) -> "Task":
        """The examples of a domain's devices. Raises ``DataError``."""
        tokenizer, context = load_tokenizer(config.model), with_context(config).model.most_tokens
        train = {name: tokenize(mine.train, tokenizer, context, name) for name, mine in data.devices.items()}
        test = [t for name, mine in data.devices.items() for t in tokenize(mine.test, tokenizer, context, name)]
        return cls(config, train, test)

    @property
    def pooled(self) -> list[Tokens]:
        """All examples, device after device."""
        return [tokens for mine in self.train.values() for tokens in mine]

    @property
    def epochs(self) -> int:
        """Passes over the examples."""
        return self.config.fine_tune.passes_in_round

    def longest(self) -> "Task":
        """The same with some batches of the longest examples, of one device, once: what needs most memory."""
        some = sorted(self.pooled, key=lambda t: -len(t.input_ids))[: _LONGEST * self.config.fine_tune.batch_size]
        settings = self.config.fine_tune.model_copy(update={"local_epochs": 1})
        return Task(self.config.model_copy(update={"fine_tune": settings}), {"one": some}, ())

    def foundation_config(self) -> PretrainedConfig:
        """Of the foundation model, without its weights."""
        return read_config(self.config.model)

    def foundation(self) -> Foundation:
        """The foundation model, freshly loaded, as transformers has it."""
        return load_foundation(self.config.model, plain=True)

    def lora(self, first_layer: int, num_layers: int) -> LoraSpec:
        """Adapters on all layers from ``first_layer`` on."""
        settings = self.config.adapters
        targets = settings.targets or LLAMA.targets
        return LoraSpec(settings.rank, settings.alpha, targets, tuple(range(first_layer, num_layers)))

    def batches(self, examples: Sequence[Tokens], epochs: int, seed: int) -> Iterator[list[list[int]]]:
        """The batches of each epoch, numbers of ``examples``: of like lengths, in random order."""
        generator = torch.Generator().manual_seed(seed)
        lengths = [len(tokens.input_ids) for tokens in examples]
        for _ in range(epochs):
            yield list(shuffled_batches(lengths, self.config.fine_tune.batch_size, generator))


@dataclass(frozen=True)
class Result:
    """What came of learning."""

    seconds: float  # of all epochs, without loading the model
    losses: tuple[float, ...]  # of each step, mean over its label tokens
    num_samples: int  # examples times epochs
    bytes_up: int  # of all devices
    bytes_down: int
    curve: tuple[tuple[float, float], ...]  # seconds of learning so far, and accuracy then; at the end at least

    @property
    def accuracy(self) -> float:
        """In the end: share of held-out examples that greedy decoding would write to the letter."""
        return self.curve[-1][1]

    def seconds_to(self, accuracy: float) -> float | None:
        """Of learning, until it was first seen to be as good; None if never."""
        return next((seconds for seconds, found in self.curve if found >= accuracy), None)

    @property
    def samples_per_s(self) -> float:
        """Examples per second."""
        return self.num_samples / self.seconds

    @property
    def bytes_per_sample(self) -> float:
        """On the devices' links, both ways."""
        return (self.bytes_up + self.bytes_down) / self.num_samples


class Watch:
    """Seconds of learning, without those of scoring, and the accuracy after each epoch."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []
        self._started = time.perf_counter()

    def score(self, model: Any, examples: Sequence[Tokens]) -> None:
        """The watch stands while this scores."""
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
        """Learn and score. Raises a ``GaisnetError``."""

    def device_flops(self, task: Task) -> float:
        """Floating-point operations per sample and epoch of the machine that holds the examples."""

    def device_peak_bytes(self, task: Task, seed: int) -> int:
        """Most memory that it holds at once, in a process of its own, interpreter and libraries included."""


def padded(examples: Sequence[Tokens]) -> dict[str, Tensor]:
    """A batch as transformers' causal models take it: int64 [B, T], padded on the right, labels at answers only."""
    ids = [torch.tensor([*t.input_ids, t.label_ids[-1]]) for t in examples]
    labels = [torch.tensor([_IGNORED] * (len(t.input_ids) + 1 - len(t.label_ids)) + [*t.label_ids]) for t in examples]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    }


def answered(examples: Sequence[Tokens]) -> dict[str, Any]:
    """The same batch, of which a model makes logits from the first answer on only: a vocabulary is long.

    Labels [B, K] then are those of the last K positions, of which the first is nobody's.
    """
    batch: dict[str, Any] = dict(padded(examples))
    labels_BT = batch["labels"]
    num_last = labels_BT.shape[1] - int((labels_BT != _IGNORED).any(0).nonzero()[0]) + 1
    return {**batch, "labels": labels_BT[:, -num_last:], "logits_to_keep": num_last}


@torch.no_grad()
def accuracy(model: Any, examples: Sequence[Tokens], shown: Sequence[int] = ()) -> float:
    """Share of examples whose every label is the likeliest token, given the ones before; nan for no examples.

    Where the model has several tokens that end an answer, any of them counts for another.

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
    """Puts batches behind tokens that ``model`` has read, whose keys and values it keeps."""

    def __init__(self, model: Any, shown: Sequence[int]) -> None:
        ids = torch.tensor([shown], device=next(model.parameters()).device)
        self._read = DynamicCache()
        model(ids, logits_to_keep=1, **{CACHE: self._read})
        self._num_shown = len(shown)

    def put(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The same batch, with what was read before it."""
        mask_BT, read = inputs["attention_mask"], copy.deepcopy(self._read)  # a model adds to what it is given
        read.batch_repeat_interleave(len(mask_BT))
        before = mask_BT.new_ones(len(mask_BT), self._num_shown)
        return {**inputs, "attention_mask": torch.cat([before, mask_BT], dim=1), CACHE: read}
