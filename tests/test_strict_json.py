"""JSON in which nothing is lost in silence, read in linear time."""

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaisnet.strict_json import DEEPEST, loads

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
)


@settings(max_examples=40, deadline=None)
@given(VALUES, st.booleans())
def test_what_is_json_is_read_as_the_standard_library_reads_it(value: Any, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert loads(text) == loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "b": 2, "a": 3}', 'the key "a" is given twice'),
        ('[{"x": {"a": 1, "a": 1}}]', 'the key "a" is given twice'),
        ('{"a": 1, "\\u0061": 1}', 'the key "a" is given twice'),
        ("NaN", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("1e400", "too large"),
        ("-1e400", "too large"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ('["\ud800"]', "surrogate"),
        ("9" * 10_000, "digits"),
        ("[" * 500_000, "deeper than"),
        ('{"a":' * 500_000, "deeper than"),
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "deeper than"),
        ("", "Expecting value"),
        ('{"a": "', "Unterminated"),
        ("\ufeff1", "BOM"),
    ],
    ids=lambda text: text[:30],
)
def test_what_is_not_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        loads(text)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(ValueError, match="byte 1 is not UTF-8"):
        loads(b'"\xff"')


def test_brackets_in_strings_are_no_depth() -> None:
    text = json.dumps(["[" * 1000, '\\"[' * 1000])
    assert loads(text) == json.loads(text)
    flat: list[list[int]] = [[] for _ in range(1000)]
    assert loads(json.dumps(flat)) == flat
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert loads(deep) == json.loads(deep)


def test_more_lists_and_objects_than_there_may_be() -> None:
    text = json.dumps([{"a": "[" * 200}] * 99)
    assert loads(text, most=100) == json.loads(text)
    with pytest.raises(ValueError, match="more than 99 lists and objects"):
        loads(text, most=99)


@pytest.mark.parametrize(
    "text",
    ['"' + '\\"' * 2**19, "[" * 2**20, "[]" * 2**19, '"' * 2**20, "[" + "[]," * 2**18 + "[]]", '{"a' * 2**18],
    ids=["escaped quotes", "open", "pairs", "quotes", "flat", "broken objects"],
)
def test_a_mebibyte_takes_linear_time(text: str) -> None:
    begun = time.process_time()
    try:
        loads(text)
    except ValueError:
        pass
    assert time.process_time() - begun < 10  # minutes, where a part of it is quadratic
