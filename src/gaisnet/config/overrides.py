"""Overrides (``--set key=value``) of settings as plain values, and messages about invalid values."""

import copy
import reprlib
from collections.abc import Sequence
from datetime import date
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gaisnet.config.yaml_text import load_yaml, problem, spelling
from gaisnet.errors import ConfigError

_MOST_DIGITS = 9  # of an index
_LONGEST = 200  # characters of somebody's input in a message


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``raw`` with each ``a.b=value`` applied.

    Values are parsed as YAML, list items by their index.
    """
    merged = copy.deepcopy(raw)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {shortened(override)}", "is not of the form key=value", "as in --set relay.enabled=false"
            )
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            found = f"'{shortened(text)}' is not YAML ({problem(error)})"
            raise ConfigError(f"--set {shortened(override)}", found, "quote it, or close its brackets") from error
        _put(merged, key.split("."), value, override)
    return merged


def keys_of(overrides: Sequence[str]) -> list[str]:
    """Return the dotted key of each override, list items by their plain index."""
    return [
        ".".join(
            part.lstrip("0") or "0" if part.isdecimal() else part for part in override.partition("=")[0].split(".")
        )
        for override in overrides
    ]


def is_set_by(overrides: Sequence[str], key: str) -> bool:
    """Return whether an override sets ``key``, by itself or with its group."""
    return any(f"{key}.".startswith(f"{given}.") for given in keys_of(overrides))


def spelled_at(location: Sequence[str | int], text: str, overrides: Sequence[str]) -> str | None:
    """Return a scalar as it was written, in an override or in the file's text; None if it is in neither."""
    for override in reversed(overrides):
        key, _, value = override.partition("=")
        parts = key.split(".")
        if parts == [str(part) for part in location[: len(parts)]]:
            return spelling(value, location[len(parts) :])
    return spelling(text, location)


def shortened(text: str) -> str:
    """Return the beginning of a text, for a message."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _put(target: Any, parts: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or len(part) > _MOST_DIGITS or int(part) >= len(target):
                found = f"'{part}' is no item of a list of {len(target)}"
                raise ConfigError(f"--set {shortened(override)}", found, "use an index, counted from 0")
            key: Any = int(part)
        elif isinstance(target, dict):
            key = part
        else:
            raise ConfigError(
                f"--set {shortened(override)}", f"'{parts[depth - 1]}' holds a value, not keys", "shorten the key"
            )
        if last:
            target[key] = value
        elif isinstance(target, list):
            target = target[key]
        else:
            if target.get(key) is None:  # not there, or without anything under it
                target[key] = {}
            target = target[key]


def most_telling(error: ValidationError) -> ErrorDetails:
    """Return the most telling of the errors that pydantic found.

    A misspelt key explains the missing one beside it; of a union's members, the one that got furthest was meant.
    """
    return min(error.errors(), key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])))


def found_in(error: ErrorDetails, spelled: str | None = None) -> str:
    """Explain why a value is wrong, and show it, shortened; ``spelled``: as it was written, if that is known."""
    message, value = error["msg"].removeprefix("Value error, "), error["input"]
    if error["type"] in ("missing", "value_error"):  # here the input is all that stands around it
        return message
    if value is None and error["type"] in _GROUPS:
        return "nothing stands under it"
    shown = reprlib.repr(value) if spelled is None or isinstance(value, str) else spelled
    if _is_unquoted(error) and (spelled or value is not None):
        return f"text is needed, and YAML reads {shown} as {_kind(value)}"
    return f"{message} (found {shown})"


def what_to_do(error: ErrorDetails, spelled: str | None = None) -> str:
    """Return advice for an error of ``found_in``."""
    if error["input"] is None and error["type"] in _GROUPS:
        return "write settings below it, indented, or remove the key"
    if error["type"] == "tuple_type" and isinstance(error["input"], str):
        return "write a list, as in [one, two]"
    if str(error.get("ctx", {}).get("pattern", "")).startswith("^[A-Za-z0-9]["):
        return "begin with a letter or a digit, and use letters from A to Z, digits, '-' and '_'"
    if not _is_unquoted(error):
        return "correct it and run again"
    if isinstance(error["input"], dict | list):
        return "quote it, for outside of quotes brackets have a meaning of their own"
    if error["input"] is None and not spelled:
        return "write some text, or remove it"
    return f"quote it: '{spelled or error['input']}'"


_GROUPS = ("model_type", "dict_type", "model_attributes_type")


def _is_unquoted(error: ErrorDetails) -> bool:
    return error["type"] == "string_type"


def _kind(value: Any) -> str:
    """Describe a value that is not text, for the author of the file."""
    if isinstance(value, bool):
        return f"{value}".lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, date):
        return f"the date {value}"
    return {type(None): "nothing", dict: "a mapping", list: "a list"}.get(type(value), f"a {type(value).__name__}")
