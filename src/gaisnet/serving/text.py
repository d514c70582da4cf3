"""Tokens of an answer to text, as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"  # what a tokenizer makes of the first bytes of a character
_LONGEST_CHARACTER = 4  # tokens that one character can take, where a token is a byte


def text_of(tokens: Iterable[int], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of text. Where a stop string appears, the text ends before it, and no more tokens are asked for.

    Args:
        tokens: Ids of the answer; closed at the end if it is a generator.
        tokenizer: Decodes them; special tokens make no text.
        stop: Strings that end the answer.
    """
    stop = [s for s in stop if s]
    ids: list[int] = []
    given = 0  # characters that are out
    try:
        for token in tokens:
            ids.append(token)
            text = _decoded(tokenizer, ids)
            if (end := _first(text, stop)) is not None:
                yield from _rest(text[given:end])
                return
            safe = len(text) - max(_unfinished(text), _could_become(text, stop))
            if safe > given:
                yield text[given:safe]
                given = safe
        yield from _rest(_decoded(tokenizer, ids)[given:])
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _rest(text: str) -> Iterator[str]:
    if text:
        yield text


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found) if found else None


def _unfinished(text: str) -> int:
    """Characters at the end that more tokens may change."""
    broken = len(text) - len(text.rstrip(_BROKEN))
    return min(broken, _LONGEST_CHARACTER)


def _could_become(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    lengths = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(lengths, default=0)
