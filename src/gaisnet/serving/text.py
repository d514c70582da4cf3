"""Tokens of an answer to text, as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

from gaisnet.serving.stopping import StopStrings

_BROKEN = "\ufffd"  # what a tokenizer makes of the first bytes of a character
_LONGEST_CHARACTER = 4  # tokens that one character can take, where a token is a byte


def text_of(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text. Where a stop string appears, the text ends before it, and no more tokens are asked for.

    Args:
        tokens: Ids of the answer; closed at the end if it is a generator.
        tokenizer: Decodes them; special tokens make no text.
        stop: Strings that end the answer.
    """
    stops = StopStrings(stop)
    ids: list[int] = []
    taken = 0  # characters that the stop strings have been looked for in
    try:
        for token in tokens:
            ids.append(token)
            text = _decoded(tokenizer, ids)
            certain = max(len(text) - _unfinished(text), taken)
            yield from _some(stops.take(text[taken:certain]))
            if stops.found:
                return
            taken = certain
        yield from _some(stops.take(_decoded(tokenizer, ids)[taken:]) + stops.rest())
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _some(text: str) -> Iterator[str]:
    if text:
        yield text


def _unfinished(text: str) -> int:
    """Characters at the end that more tokens may change."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    return min(broken, _LONGEST_CHARACTER)
