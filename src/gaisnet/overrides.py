"""A file of settings as plain values: YAML in which no key is given twice, and ``--set key=value`` on top of it.

And what is said of values that settings do not take.
"""

import copy
import reprlib
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from gaisnet.errors import ConfigError


def with_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``raw`` with each ``a.b=value`` put in; values are read as YAML, list items by their index."""
    merged = copy.deepcopy(raw)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override}", "is not of the form key=value", "as in --set relay.enabled=false")
        try:
            value = load_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}", f"'{text}' is not YAML", "quote it or close its brackets") from error
        _put(merged, key.split("."), value, override)
    return merged


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The dotted key of each, list items by their plain index."""
    return [
        ".".join(str(int(part)) if part.isdecimal() else part for part in override.partition("=")[0].split("."))
        for override in overrides
    ]


def is_set_by(overrides: Sequence[str], key: str) -> bool:
    """Whether one of them gives ``key`` its value, by itself or with a group that it is in."""
    return any(f"{key}.".startswith(f"{given}.") for given in keys_of(overrides))


def _put(target: Any, parts: list[str], value: Any, override: str) -> None:
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not part.isdecimal() or int(part) >= len(target):
                found = f"'{part}' is no item of a list of {len(target)}"
                raise ConfigError(f"--set {override}", found, "use an index, counted from 0")
            key: Any = int(part)
        elif isinstance(target, dict):
            key = part
        else:
            raise ConfigError(f"--set {override}", f"'{parts[depth - 1]}' holds a value, not keys", "shorten the key")
        if last:
            target[key] = value
        else:
            target = target[key] if isinstance(target, list) else target.setdefault(key, {})


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key that is given twice is an error: the first value would be lost in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                raise yaml.composer.ComposerError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
        return node


def load_yaml(text: str) -> Any:
    """YAML by its safe loader. Raises ``yaml.YAMLError``, also where a key is given twice."""
    return yaml.load(text, Loader=_UniqueKeyLoader)


def most_telling(error: ValidationError) -> ErrorDetails:
    """Of what pydantic found wrong with settings.

    A misspelt key explains the missing one beside it, and of a union's members the one that got furthest was meant.
    """
    return min(error.errors(), key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])))


def found_in(error: ErrorDetails) -> str:
    """What is wrong with a value, and the value, shortened."""
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("missing", "value_error"):  # here the input is all that stands around it
        return message
    return f"{message} (found {reprlib.repr(error['input'])})"
