"""From logits to text: sampling of tokens, stop strings, and whole characters as tokens arrive.

Shape legend: V vocabulary.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gaisnet.errors import SessionRefused
from gaisnet.models.tokenization import GrowingText

_COLDEST = 1e-5
"""Lower temperatures count as 0: dividing by them would overflow float32."""


@dataclass(frozen=True)
class Sampling:
    """Choice of tokens, and the end of an answer."""

    max_tokens: int = 128
    temperature: float = 0.0  # 0, or almost 0, takes the most likely token
    top_p: float = 1.0  # the smallest set of tokens with this much probability is drawn from
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()  # tokens that end the answer, included as its last token

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise SessionRefused("max_tokens", f"it is {self.max_tokens}", "use 1 or more")
        if not 0 <= self.temperature < float("inf"):
            raise SessionRefused("temperature", f"it is {self.temperature}", "use 0 or more")
        if not 0 < self.top_p <= 1:
            raise SessionRefused("top_p", f"it is {self.top_p}", "use more than 0, and at most 1")


class Sampler:
    """Draws tokens. Equal seed and logits give equal tokens.

    Args:
        sampling: Temperature, top-p and seed.
    """

    def __init__(self, sampling: Sampling) -> None:
        self._temperature = 0.0 if sampling.temperature < _COLDEST else sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Return the distribution to draw from, float32 [V] on the CPU.

        At temperature 0, all on the most likely token.
        """
        logits_V = logits_V.float().cpu()
        if not self._temperature:
            return torch.zeros_like(logits_V).index_fill_(0, logits_V.argmax(), 1.0)
        probabilities_V = (logits_V / self._temperature).softmax(0)
        return probabilities_V if self._top_p == 1 else _nucleus(probabilities_V, self._top_p)

    def draw(self, probabilities_V: Tensor) -> int:
        """Draw a token; probabilities need not sum to one."""
        if not self._temperature:
            return int(probabilities_V.argmax())
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))

    def accepts(self, probability: float) -> bool:
        """Return True with this probability."""
        if probability >= 1 or not self._temperature:
            return probability >= 1
        return float(torch.rand((), generator=self._generator)) < probability


def _nucleus(probabilities_V: Tensor, top_p: float) -> Tensor:
    """Keep only the most likely tokens that together reach ``top_p``; at least one."""
    sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
    dropped_V = sorted_V.cumsum(0) - sorted_V >= top_p  # earlier ones reach top_p
    dropped_V[0] = False  # also if float32 rounds top_p to 0
    kept_V = probabilities_V.index_fill(0, order_V[dropped_V], 0.0)
    return kept_V / kept_V.sum()


class StopStrings:
    """Passes on the text of an answer that certainly precedes every stop string.

    The text ends before the stop string that is complete first; of several that end at the same character, before the
    longest. How the text is cut into pieces makes no difference.

    Args:
        stops: Strings that end the text; empty ones do not.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._searches = [_Search(stop) for stop in stops if stop]
        self._held = ""  # may become a stop string, or a part of one
        self.found = False
        """Whether the text has ended."""

    def feed(self, piece: str) -> str:
        """Add a piece; return the text that has become certain, possibly empty."""
        self._held += piece
        start = len(self._held) - len(piece)
        for at, character in enumerate(piece, start + 1):
            lengths = [search.length for search in self._searches if search.complete(character)]
            if lengths:
                self.found = True
                return self._release(at - max(lengths))
        return self._release(len(self._held) - max((search.matched for search in self._searches), default=0))

    def before_stop_in(self, piece: str) -> str | None:
        """Return the text before the stop string that ``piece`` would complete next; None if it completes none."""
        if not piece:
            return None
        ahead = copy.copy(self)
        ahead._searches = [copy.copy(search) for search in self._searches]
        text = ahead.feed(piece)
        return text if ahead.found else None

    def rest(self) -> str:
        """Return all held text when no more comes; nothing after a stop string."""
        return "" if self.found else self._release(len(self._held))

    def _release(self, end: int) -> str:
        given, self._held = self._held[:end], self._held[end:]
        return given


class _Search:
    """Matches one stop string against the end of the text."""

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self.length = len(stop)
        self.matched = 0
        self._borders = [0]  # for each prefix, its longest proper prefix that is also its suffix
        for character in stop[1:]:
            self._borders.append(self._longer(self._borders[-1], character))

    def complete(self, character: str) -> bool:
        """Add a character; return whether the text now ends with the stop string. Not to be called after that."""
        self.matched = self._longer(self.matched, character)
        return self.matched == self.length

    def _longer(self, matched: int, character: str) -> int:
        while matched and self._stop[matched] != character:
            matched = self._borders[matched - 1]
        return matched + (self._stop[matched] == character)


def text_of(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), continues: bool = False
) -> Iterator[str]:
    """Yield pieces of text. At a stop string the text ends before it, and no more tokens are requested.

    The pieces together equal the tokenizer's decoding of all tokens at once.

    Args:
        tokens: Ids of the answer; closed at the end if it is a generator.
        tokenizer: Decodes them; special tokens give no text.
        stop: Strings that end the answer.
        continues: Whether the text continues a prompt, and so keeps a space at its beginning.
    """
    growing, stops = GrowingText(tokenizer, continues), StopStrings(stop)
    try:
        for token in tokens:
            yield from _some(stops.feed(growing.add_token(token)))
            if stops.found:
                return
            if (end := stops.before_stop_in(growing.rest()) if stop else None) is not None:
                yield from _some(end)  # later tokens could change this text, but none will come
                return
        yield from _some(stops.feed(growing.rest()) + stops.rest())
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _some(text: str) -> Iterator[str]:
    if text:
        yield text
