"""Tokens of an answer to text, as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from gaisnet.models.tokenization import GrowingText


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
    stop = [s for s in stop if s]
    growing = GrowingText(tokenizer, continues)
    held = ""  # certain, but it may be the beginning of a stop string
    try:
        for token in tokens:
            held += growing.add(token)
            seen = held + growing.rest() if stop else held
            if (end := _first(seen, stop)) is not None:
                yield from _rest(seen[:end])
                return
            safe = len(held) - _could_become(held, stop)
            yield from _rest(held[:safe])
            held = held[safe:]
        yield from _rest(held + growing.rest())
    finally:
        close = getattr(tokens, "close", None)
        if close is not None:
            close()


def _rest(text: str) -> Iterator[str]:
    if text:
        yield text


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the earliest stop string begins."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found) if found else None


def _could_become(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may be the beginning of a stop string."""
    lengths = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    return max(lengths, default=0)
