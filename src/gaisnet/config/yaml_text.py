"""YAML as plain values: unique keys, limited size, and each scalar as it was written.

YAML reads an unquoted ``no`` as false, ``1_000`` as a number and ``2024-01-31`` as a date. Where text is expected, the
original spelling is needed for the message.
"""

from collections.abc import Sequence
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

DEEPEST = 64
"""Deepest nesting of lists and mappings."""

MOST_VALUES = 200_000
"""Most values of a text after its aliases are expanded, which can be exponentially many."""


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader with limits; a duplicate key is an error, since its first value would be lost."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {})
        return node

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ComposerError(None, None, _TOO_DEEP, self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ComposerError(None, None, f"the key '{key.value}' is given twice", key.start_mark)
                seen.add(key.value)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            # An impossible date, a number of too many digits, a tag that does not fit what it is put on.
            kind = node.tag.rpartition(":")[2].replace("timestamp", "date")
            spelled = f"'{node.value[:40]}'" if isinstance(node, yaml.ScalarNode) else "this"
            found = f"{spelled} is read as a {kind} and is none ({error})"
            raise ConstructorError(None, None, found, node.start_mark) from error


_TOO_DEEP = f"values nest deeper than {DEEPEST} levels"


def _measure(node: yaml.Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count values in a node after its aliases are expanded, and their depth.

    Raises ``ComposerError`` beyond the limits.
    """
    known = measured.get(id(node), (0, 0))
    if known is None:
        raise ComposerError(None, None, "an alias stands inside what it stands for", node.start_mark)
    if known != (0, 0):
        return known
    measured[id(node)] = None
    num_values, depth = 1, 1
    for child in _children(node):
        more, below = _measure(child, measured)
        num_values, depth = num_values + more, max(depth, below + 1)
    if num_values > MOST_VALUES:
        raise ComposerError(None, None, f"its aliases stand for more than {MOST_VALUES} values", node.start_mark)
    if depth > DEEPEST:
        raise ComposerError(None, None, _TOO_DEEP, node.start_mark)
    measured[id(node)] = num_values, depth
    return num_values, depth


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def load_yaml(text: str) -> Any:
    """Parse YAML as plain values. Raises ``yaml.YAMLError``, also for duplicate keys and beyond the limits."""
    return yaml.load(text, Loader=_StrictLoader)


def spelling(text: str, location: Sequence[str | int]) -> str | None:
    """Return a scalar as it is written in a valid text; None if there is none at ``location``.

    Names in ``location`` that are not keys are skipped: pydantic inserts those of a union's members.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=_StrictLoader)
    for part in location:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part] if part < len(node.value) else None
    return node.value if isinstance(node, yaml.ScalarNode) else None


def problem(error: yaml.YAMLError) -> str:
    """Return a loader's error, with its line, in one line of text."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
    return f"{error.problem or error.context}{where}"


def way_out(error: yaml.YAMLError) -> str:
    """Return advice for a loader's error."""
    said = str(error)
    if isinstance(error, ConstructorError):
        return "quote it if it is text, or correct it"
    if "'\\t'" in said:
        return "indent with spaces, not with tabs"
    if "another document" in said:
        return "keep one document, without '---' behind it"
    return "correct that line"
