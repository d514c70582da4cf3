"""A device's private examples, and how they become token ids."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypeVar  # of the standard library once it is Python 3.13: with defaults

from gaisnet.errors import DataError
from gaisnet.messages import Split
from gaisnet.models.tokenization import pair_ids


@dataclass(frozen=True)
class Example:
    """A prompt and the completion that the model should write after it. Never leaves its device."""

    prompt: str
    completion: str


Input = str | Tensor
"""What is classified: a text, or the pixels [channels, height, width] of an image, float and normalised."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """A text or an image, and the name of its class. Never leaves its device."""

    input: Input
    label: str


E = TypeVar("E", default=Example)


@dataclass(frozen=True)
class DeviceData(Generic[E]):
    """What one device holds, ``Example`` or ``Labelled``: to learn from, held out, and held back for the gate."""

    train: tuple[E, ...]
    test: tuple[E, ...]
    validate: tuple[E, ...] = ()

    def splits(self) -> dict[Split, tuple[E, ...]]:
        """All examples, by what they are for."""
        return {"train": self.train, "validate": self.validate, "test": self.test}

    def with_validation_split(self, share: float, owner: str) -> "DeviceData[E]":
        """The same with a share of what there is to learn from held back, one at least unless the share is 0.

        One is drawn out of each stretch of as many: files are often in order, or in turn. At every site it is the same
        one. Raises ``DataError`` where nothing would be left.
        """
        num_train = len(self.train)
        if not share or not num_train:
            return self
        if num_train == 1:
            found = "has one training example, which cannot be both learned from and held back"
            raise DataError(f"device '{owner}'", found, "give it more, or set absorb.validation_share to 0")
        num, draw = max(1, round(share * num_train)), random.Random(owner)
        back = {draw.randrange(i * num_train // num, (i + 1) * num_train // num) for i in range(num)}
        train = tuple(each for i, each in enumerate(self.train) if i not in back)
        return DeviceData(train, self.test, tuple(self.train[i] for i in sorted(back)))


def has_images(data: DeviceData[Any]) -> bool:
    """Whether any example is an image, for which no tokenizer is needed."""
    every = (one for some in data.splits().values() for one in some)
    return any(isinstance(one, Labelled) and isinstance(one.input, Tensor) for one in every)


@dataclass(frozen=True)
class Tokens:
    """An example in token ids.

    ``input_ids`` is prompt and completion as ``models.tokenization`` encodes them, without the closing end-of-sequence
    token, which is only ever predicted.
    ``label_ids`` is the completion and the end-of-sequence token; they are predicted at the last ``len(label_ids)``
    positions of ``input_ids``.
    """

    input_ids: tuple[int, ...]
    label_ids: tuple[int, ...]
    num_dropped: int = 0  # tokens of the prompt, for which the context has no room


def tokenize(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int, owner: str) -> list[Tokens]:
    """Token ids of ``examples``, at most ``context`` input tokens each; a longer prompt loses its beginning.

    Raises ``DataError`` where a completion is empty or leaves no room for a single token of its prompt.
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
