"""Stop strings against a search that reads the whole text anew for each character."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from gaisnet.serving.generation.text import StopStrings


def plainly(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first, the longest of them."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if stop and text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)]
    return text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab", max_size=6)), st.lists(st.text("ab", max_size=5), max_size=4))
def test_the_text_ends_where_it_should_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    search, expected = StopStrings(stops), plainly("".join(pieces), stops)
    given = ""
    for piece in pieces:
        given += search.feed(piece)
        assert expected.startswith(given)  # nothing has to be taken back
        if search.found:
            break
    assert given + search.rest() == expected
    assert search.found == (expected != "".join(pieces))


def test_what_cannot_become_a_stop_string_is_given_at_once() -> None:
    search = StopStrings(["aab"])
    assert [search.feed(c) for c in "aaaac"] == ["", "", "a", "a", "aac"]


def test_long_stop_strings_take_linear_time() -> None:
    begun = time.process_time()
    search = StopStrings(["ab" * 100_000 + "c"] * 4)
    for piece in ["ab" * 50] * 2_000:
        search.feed(piece)
    assert not search.found
    assert time.process_time() - begun < 30  # hours, where each token costs a search through them
