"""Text of an answer: whole characters, and an end before a stop string, wherever the tokens break."""

from collections.abc import Iterator

import pytest

from gaisnet.serving.generation.text import text_of
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # one token per byte


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return found


def pieces(text: str, *stop: str) -> list[str]:
    return list(text_of(ids(text), TOKENIZER, stop))


def test_pieces_are_the_text() -> None:
    assert pieces("abc") == ["a", "b", "c"]
    assert pieces("") == []


def test_a_character_comes_when_it_is_whole() -> None:
    assert pieces("a€😀b") == ["a", "€", "😀", "b"]


def test_a_character_that_never_ends_is_given_at_the_end() -> None:
    assert "".join(text_of(ids("a€")[:-1], TOKENIZER)) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("say END now", ["END"], "say "),
        ("EEND", ["END"], "E"),
        ("END", ["END"], ""),
        ("say EN", ["END"], "say EN"),
        ("a\n\nb", ["\n\n"], "a"),
        ("one two", ["two", "e t"], "on"),
        ("one", ["", "x"], "one"),
        ("fin€ und", ["€"], "fin"),
    ],
)
def test_stop_strings(text: str, stop: list[str], expected: str) -> None:
    assert "".join(pieces(text, *stop)) == expected


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert pieces("aENb", "END") == ["a", "ENb"]


def test_no_token_is_asked_for_after_a_stop_string() -> None:
    asked: list[int] = []
    closed: list[bool] = []

    def tokens() -> Iterator[int]:
        try:
            for token in ids("a.bc"):
                asked.append(token)
                yield token
        finally:
            closed.append(True)

    assert list(text_of(tokens(), TOKENIZER, ["."])) == ["a"]
    assert (len(asked), closed) == (2, [True])


def test_special_tokens_make_no_text() -> None:
    assert list(text_of([*ids("a"), 257], TOKENIZER)) == ["a"]
