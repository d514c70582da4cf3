"""Fields of requests: supported ones, OpenAI's that are not, and unknown ones."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

_LONGEST_NAME = 80

NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's request fields that are not supported, and their values that request nothing."""

NEUTRAL_OF_MESSAGE: Mapping[str, Sequence[Any]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
"""The same for a message."""

FOREIGN_ROLES = ("tool", "function")
FOREIGN_PARTS = ("image_url", "input_audio", "file", "refusal")
"""OpenAI's roles of messages and kinds of content that a text model cannot read."""


class BadRequest(Exception):
    """A request that cannot be served. ``param`` names the field, ``code`` is for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def unsupported(what: str, param: str) -> BadRequest:
    """Return the error for an unsupported feature of OpenAI's API."""
    return BadRequest(f"{what} that this server does not support; leave it out", param, "unsupported_parameter")


def asked_for(
    raw: Mapping[str, Any], taken: Collection[str], neutral: Mapping[str, Sequence[Any]], where: str = ""
) -> dict[str, Any]:
    """Return the fields that request something; null requests nothing, wherever it stands.

    Args:
        raw: All fields.
        taken: Names of supported fields.
        neutral: OpenAI's unsupported fields, and their values that request nothing.
        where: Name of the object with the fields, followed by a dot, for messages.

    Raises:
        BadRequest: The first unsupported field.
    """
    found = {}
    for name, value in raw.items():
        if value is None or (name not in taken and _is_one_of(value, neutral.get(name, ()))):
            continue
        shown = f"{where}{name[:_LONGEST_NAME]}"
        if name in taken:
            found[name] = value
        elif name in neutral:
            raise unsupported(f"'{shown}' is an OpenAI field", shown)
        else:
            raise BadRequest(f"'{shown}' is not a field of this request", shown, "unknown_parameter")
    return found


def _is_one_of(value: Any, known: Sequence[Any]) -> bool:
    return any(type(value) is type(one) and value == one for one in known)
