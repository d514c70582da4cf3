"""Responses in OpenAI's format, with our own field: the body that wrote."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gaisnet.serving.generation.answering import Course


def usage_of(courses: Sequence[Course]) -> dict[str, int]:
    """Return the tokens of all prompts and answers."""
    prompt = sum(course.num_prompt_tokens for course in courses)
    written = sum(course.num_tokens for course in courses)
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def course_of(course: Course) -> dict[str, Any]:
    """Return our own field: the body that wrote."""
    said: dict[str, Any] = {"body": course.now, "domain": course.domain, "escalated_at": course.escalated_at}
    if course.cloud_refused:
        said["cloud_refused"] = True
    if course.tally is not None:
        tally = course.tally
        said |= {"drafted": tally.num_drafted, "accepted": tally.num_accepted, "checks": tally.num_checks}
    return said


@dataclass(frozen=True)
class Envelope:
    """Common fields of the responses to one request. ``kind`` is 'chat' or 'text'."""

    kind: Literal["chat", "text"]
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: Literal["chat", "text"], model: str) -> "Envelope":
        """Make an envelope with an unguessable id."""
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, model, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, texts: Sequence[str], courses: Sequence[Course]) -> dict[str, Any]:
        """Return the response to a request that does not stream: a choice per prompt.

        Our own field stands beside a single choice, and inside each of several.
        """
        choices = [self._choice(*each) for each in zip(range(len(texts)), texts, courses, strict=True)]
        said = {"gaisnet": course_of(courses[0])}
        if len(courses) > 1:
            choices = [choice | {"gaisnet": course_of(of)} for choice, of in zip(choices, courses, strict=True)]
            said = {}
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._top(name), "choices": choices, "usage": usage_of(courses), **said}

    def _choice(self, index: int, text: str, course: Course) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "finish_reason": course.finish_reason, "logprobs": None}
        if self.kind == "chat":
            return choice | {"message": {"role": "assistant", "content": text, "refusal": None}}
        return choice | {"text": text}

    def first(self) -> Iterator[dict[str, Any]]:
        """Return the chunks before all text."""
        if self.kind == "chat":
            yield self._chunk(0, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, index: int, text: str, course: Course) -> dict[str, Any]:
        """Return a chunk of a choice's text, and the body that writes."""
        choice = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return {**self._chunk(index, {**choice, "finish_reason": None}), "gaisnet": {"body": course.now}}

    def last(self, index: int, course: Course) -> dict[str, Any]:
        """Return the chunk after all text of a choice."""
        choice: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return {
            **self._chunk(index, {**choice, "finish_reason": course.finish_reason}),
            "gaisnet": course_of(course),
        }

    def usage(self, courses: Sequence[Course]) -> dict[str, Any]:
        """Return the chunk after all choices, for a stream that reports usage."""
        return {**self._chunk(0, None), "usage": usage_of(courses)}

    def _chunk(self, index: int, choice: Mapping[str, Any] | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        choices = [] if choice is None else [{"index": index, "logprobs": None, **choice}]
        return {**self._top(name), "choices": choices}

    def _top(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}
