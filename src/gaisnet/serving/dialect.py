"""Requests and responses in OpenAI's words, and the few of our own.

What a request asks for and we cannot do is refused, never ignored; fields that only tell who asks are let be.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json
from transformers import PreTrainedTokenizerBase

from gaisnet.config import FrontSettings
from gaisnet.models.tokenization import chat_ids, prompt_ids
from gaisnet.serving.answering import Ask, Course
from gaisnet.serving.sampling import Sampling

_COMPLETION_TOKENS = 16  # OpenAI's default
_SEEDS = 2**63
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0, 0.0),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields of OpenAI's that are taken only with values that ask for nothing."""

R = TypeVar("R", bound="Request")
_Stop = Annotated[str, StringConstraints(min_length=1)]


class BadRequest(Exception):
    """A request that cannot be meant. ``param`` names the field, ``code`` says it to programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StreamOptions(_Strict):
    """What a stream has besides text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # taken, and nothing is padded


class Request(_Strict):
    """What chats and completions have in common."""

    model: str
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    seed: int | None = Field(None, ge=-_SEEDS, lt=_SEEDS)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    domain: str | None = Field(None, description="Ours: the domain that 'auto' writes for, if not the device's own.")
    speculate: bool | None = Field(None, description="Ours: the DM drafts, the FM checks; the text is the FM's.")
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def ask(self, prompt: tuple[int, ...], max_tokens: int, limits: FrontSettings, continues: bool = False) -> Ask:
        """The same for ``Answering``. Raises ``BadRequest`` where it asks for more than the limits let it."""
        if len(prompt) > limits.max_prompt_tokens:
            found = f"the prompt has {len(prompt)} tokens, the limit is {limits.max_prompt_tokens}"
            raise BadRequest(found, self.prompt_field(), "context_length_exceeded")
        if max_tokens > limits.max_answer_tokens:
            raise BadRequest(f"max_tokens is {max_tokens}, the limit is {limits.max_answer_tokens}", "max_tokens")
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbelow(_SEEDS) if self.seed is None else self.seed,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Ask(self.model, prompt, sampling, stop, self.domain, self.speculate, continues)

    @classmethod
    def prompt_field(cls) -> str:
        """Where the prompt stands."""
        raise NotImplementedError

    def to_ask(self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int) -> Ask:
        """What to write. Raises ``BadRequest`` or ``SessionRefused``.

        Args:
            tokenizer: The FM's.
            limits: Of prompt and answer.
            room: Tokens that prompt and answer may have together.
        """
        raise NotImplementedError


class TextPart(_Strict):
    """A part of a message; of the others that OpenAI knows the model could read none."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None

    def plain(self) -> dict[str, str]:
        """For a chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @classmethod
    def prompt_field(cls) -> str:
        """Where the prompt stands."""
        return "messages"

    def to_ask(self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int) -> Ask:
        """See ``Request.to_ask``."""
        prompt = chat_ids(tokenizer, [message.plain() for message in self.messages])
        asked = self.max_completion_tokens or self.max_tokens
        default = max(1, min(limits.default_chat_tokens, limits.max_answer_tokens, room - len(prompt)))
        return self.ask(prompt, asked or default, limits)


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(None, ge=1)

    @classmethod
    def prompt_field(cls) -> str:
        """Where the prompt stands."""
        return "prompt"

    def to_ask(self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int) -> Ask:
        """See ``Request.to_ask``."""
        prompt = self._only()
        ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)
        return self.ask(ids, self.max_tokens or _COMPLETION_TOKENS, limits, continues=True)

    def _only(self) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and all(isinstance(part, int) for part in self.prompt):
            return [part for part in self.prompt if isinstance(part, int)]
        if len(self.prompt) != 1 or isinstance(only := self.prompt[0], int):
            raise BadRequest(f"prompt holds {len(self.prompt)} prompts; send one in a request", "prompt")
        return only


_KNOWN = {
    name
    for group in (ChatRequest, CompletionRequest, ChatMessage, TextPart, StreamOptions)
    for name in group.model_fields
}


def read_request(kind: type[R], body: bytes) -> R:
    """A request out of JSON. Raises ``BadRequest``."""
    raw = _object(body)
    for name in [name for name in _NEUTRAL if name in raw and name not in kind.model_fields]:
        value = raw.pop(name)
        neutral = any(type(value) is type(known) and value == known for known in _NEUTRAL[name])
        if value is not None and not neutral:
            raise BadRequest(f"{name} is not supported here; leave it out", name, "unsupported_parameter")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # Of the errors of a union's members, that which is not about the type is about the member that was meant.
        first = min(error.errors(include_url=False, include_context=False), key=lambda e: e["type"].endswith("_type"))
        where = ".".join(str(part) for part in first["loc"] if part in _KNOWN or isinstance(part, int))
        if first["type"] == "extra_forbidden":
            where = ".".join(map(str, first["loc"]))
            raise BadRequest(f"{where} is not a field of this request", where, "unknown_parameter") from None
        raise BadRequest(f"{where}: {first['msg']}", where) from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise BadRequest("the body is not a JSON object", code="invalid_json")
    return raw


def usage_of(course: Course) -> dict[str, int]:
    """Tokens of prompt and answer."""
    prompt, written = course.num_prompt_tokens, course.num_tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def course_of(course: Course) -> dict[str, Any]:
    """Our own field: which body wrote."""
    said: dict[str, Any] = {"body": course.now, "domain": course.domain, "escalated_at": course.escalated_at}
    if course.cloud_refused:
        said["cloud_refused"] = True
    if course.tally is not None:
        tally = course.tally
        said |= {"drafted": tally.num_drafted, "accepted": tally.num_accepted, "checks": tally.num_checks}
    return said


@dataclass(frozen=True)
class Envelope:
    """What responses to one request have in common. ``kind`` is 'chat' or 'text'."""

    kind: Literal["chat", "text"]
    model: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: Literal["chat", "text"], model: str) -> "Envelope":
        """With a name that nobody can guess."""
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(kind, model, f"{prefix}-{secrets.token_hex(12)}", int(time.time()))

    def whole(self, text: str, course: Course) -> dict[str, Any]:
        """The response to a request that does not stream."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": course.finish_reason, "logprobs": None}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._top(name), "choices": [choice], "usage": usage_of(course), "gaisnet": course_of(course)}

    def first(self) -> Iterator[dict[str, Any]]:
        """Chunks before all text."""
        if self.kind == "chat":
            yield self._chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def piece(self, text: str, course: Course) -> dict[str, Any]:
        """A chunk of text, and which body writes."""
        choice = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return {**self._chunk({**choice, "finish_reason": None}), "gaisnet": {"body": course.now}}

    def last(self, course: Course, include_usage: bool) -> Iterator[dict[str, Any]]:
        """Chunks behind all text."""
        choice: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        yield {**self._chunk({**choice, "finish_reason": course.finish_reason}), "gaisnet": course_of(course)}
        if include_usage:
            yield {**self._chunk(None), "usage": usage_of(course)}

    def _chunk(self, choice: Mapping[str, Any] | None) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        choices = [] if choice is None else [{"index": 0, "logprobs": None, **choice}]
        return {**self._top(name), "choices": choices}

    def _top(self, name: str) -> dict[str, Any]:
        return {"id": self.id, "object": name, "created": self.created, "model": self.model}
