"""A device's private examples, and their tokenization."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypeVar  # with defaults; in the standard library from Python 3.13 on

from gaisnet.errors import DataError
from gaisnet.messages import Split
from gaisnet.models.tokenization import pair_ids


@dataclass(frozen=True)
class Example:
    """A prompt and its completion. Never leaves its device."""

    prompt: str
    completion: str


Input = str | Tensor
"""An input of a classifier: a text, or the normalised float pixels [channels, height, width] of an image."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A text or an image, and the name of its class. Never leaves its device."""

    input: Input
    label: str


E = TypeVar("E", default=Example)


@dataclass(frozen=True)
class DeviceData(Generic[E]):
    """Training, test and validation set of a device, with elements of type ``Example`` or ``Labelled``."""

    train: tuple[E, ...]
    test: tuple[E, ...]
    validate: tuple[E, ...] = ()

    def splits(self) -> dict[Split, tuple[E, ...]]:
        """Return all examples by split."""
        return {"train": self.train, "validate": self.validate, "test": self.test}

    def with_validation_split(self, share: float, owner: str) -> "DeviceData[E]":
        """Move a share of the training set to a validation set, at least one example unless the share is 0.

        The training set is divided into equal ranges and one example drawn from each, since files are often sorted.
        The draw depends on ``owner`` only. Raises ``DataError`` where no training example would be left.
        """
        num_train = len(self.train)
        if not share or not num_train:
            return self
        if num_train == 1:
            found = "has one training example, which cannot be in both training and validation set"
            raise DataError(f"device '{owner}'", found, "give it more, or set absorb.validation_share to 0")
        num, draw = max(1, round(share * num_train)), random.Random(owner)
        drawn = {draw.randrange(i * num_train // num, (i + 1) * num_train // num) for i in range(num)}
        train = tuple(each for i, each in enumerate(self.train) if i not in drawn)
        return DeviceData(train, self.test, tuple(self.train[i] for i in sorted(drawn)))


def has_images(data: DeviceData[Any]) -> bool:
    """Return whether any example is an image, for which no tokenizer is needed."""
    every = (one for some in data.splits().values() for one in some)
    return any(isinstance(one, Labelled) and isinstance(one.input, Tensor) for one in every)


@dataclass(frozen=True)
class Tokens:
    """Token ids of an example.

    Attributes:
        input_ids: Prompt and completion, without the end-of-sequence token, which is only predicted.
        label_ids: Completion and end-of-sequence token, predicted at the last ``len(label_ids)`` positions of
            ``input_ids``.
        num_dropped: Tokens of the prompt that did not fit into the context.
    """

    input_ids: tuple[int, ...]
    label_ids: tuple[int, ...]
    num_dropped: int = 0


def tokenize(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int, owner: str) -> list[Tokens]:
    """Tokenize ``examples`` to at most ``context`` input tokens each; longer prompts are cut at the beginning.

    Raises ``DataError`` where a completion is empty or leaves no room for its prompt.
    """
    return [
        _tokenize_one(example, tokenizer, context, f"{owner}, example {i + 1}") for i, example in enumerate(examples)
    ]


def _tokenize_one(example: Example, tokenizer: PreTrainedTokenizerBase, context: int, asked: str) -> Tokens:
    pair = pair_ids(tokenizer, example.prompt, example.completion)
    if not pair.prompt or not pair.completion:
        raise DataError(asked, "has an empty prompt or completion", "give each example some text in both")
    try:
        input_ids = pair.shortened(context)
    except ValueError:
        found = f"the completion has {len(pair.completion)} tokens but the context holds {context}"
        raise DataError(asked, found, "shorten it or raise model.context") from None
    return Tokens(input_ids, (*pair.completion, tokenizer.eos_token_id), len(pair) - len(input_ids))
