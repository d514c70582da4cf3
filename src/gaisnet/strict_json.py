"""Strict JSON: unique keys, finite numbers, valid Unicode, limited depth."""

import json
import math
import re
from typing import Any, NoReturn

DEEPEST = 64
"""Deepest nesting of lists and objects."""

_MOST_DIGITS = 4300  # Python's own limit, whose error speaks of its settings
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_BRACKETS = bytes.maketrans(b"[]{}", b"()()")
_OTHERS = bytes(set(range(128)) - set(b"[]{}"))
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str | bytes, most: int | None = None) -> Any:
    """Parse JSON in time linear in its length.

    Args:
        text: A string, or UTF-8 bytes; a byte order mark is not part of JSON.
        most: Most lists and objects; each costs many times the memory of its two characters. None for any
            number.

    Raises:
        ValueError: Not JSON, a duplicate key, a number that is not finite, half of
            a surrogate pair, nesting beyond ``DEEPEST``, or more values than ``most``. The message
            says which, in words for the author of the text.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    _check_brackets(text, most)
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:  # brackets that are never closed
        raise ValueError(_TOO_DEEP) from None
    if _SURROGATE.search(text) or not text.isascii():
        _check_unicode(value)
    return value


_TOO_DEEP = f"values nest deeper than {DEEPEST} levels"


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None


def _whole(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _check_brackets(text: str, most: int | None) -> None:
    """Raise ``ValueError`` for too many or too deep brackets; each round removes the innermost pairs, all at once."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    brackets = _STRING.sub("", text).encode("ascii", "ignore").translate(_BRACKETS, _OTHERS)
    if most is not None and brackets.count(b"(") > most:
        raise ValueError(f"it holds more than {most} lists and objects")
    for _ in range(DEEPEST):
        if b"()" not in brackets:
            return
        brackets = brackets.replace(b"()", b"")
    if b"()" in brackets:
        raise ValueError(_TOO_DEEP)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {json.dumps(twice[:80])} is given twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _check_unicode(value: Any) -> None:
    """Raise ``ValueError`` for half of a surrogate pair in a key or a string."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
        elif isinstance(one, str):
            try:
                one.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("a string holds half of a surrogate pair, which is no character") from None
