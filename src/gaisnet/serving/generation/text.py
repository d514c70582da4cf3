"""Tokens of an answer to text, as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gaisnet.models.tokenization import GrowingText
from gaisnet.serving.generation.stop_strings import StopStrings


def text_of(
    tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), continues: bool = False
) -> Iterator[str]:
    """Pieces of text. Where a stop string appears, the text ends before it, and no more tokens are asked for.

    Together they are what the tokenizer makes of all tokens at once.

    Args:
        tokens: Ids of the answer; closed at the end if it is a generator.
        tokenizer: Decodes them; special tokens make no text.
        stop: Strings that end the answer.
        continues: The text goes on from a prompt, and so keeps a space that it begins with.
    """
    growing, stops = GrowingText(tokenizer, continues), StopStrings(stop)
    try:
        for token in tokens:
            yield from _some(stops.take(growing.add(token)))
            if stops.found:
                return
            if (end := stops.before_stop_in(growing.rest()) if stop else None) is not None:
                yield from _some(end)  # later tokens could change the text there, but none will come
                return
        yield from _some(stops.take(growing.rest()) + stops.rest())
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _some(text: str) -> Iterator[str]:
    if text:
        yield text
