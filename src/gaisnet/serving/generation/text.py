"""Text of an answer from its tokens as they arrive: whole characters only, up to a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gaisnet.models.tokenization import GrowingText
from gaisnet.serving.generation.stop_strings import StopStrings


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
