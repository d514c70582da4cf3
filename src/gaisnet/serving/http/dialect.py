"""Requests in OpenAI's format, with a few fields of our own: supported fields, unsupported ones, and limits.

A request that cannot be served is refused, never ignored; fields that only identify the caller are accepted. Any
request costs time linear in its length, and nothing after its first error.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
)
from transformers import PreTrainedTokenizerBase

from gaisnet import strict_json
from gaisnet.config import FrontSettings
from gaisnet.models.tokenization import chat_ids, prompt_ids
from gaisnet.serving.generation.answering import GenerationRequest
from gaisnet.serving.generation.text import Sampling
from gaisnet.serving.http.refusals import BadRequest

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


LONGEST_STOP = 1024
"""Characters of a stop string; like OpenAI we take four strings."""
_MOST_METADATA = 16  # pairs, as in OpenAI's API
_COMPLETION_TOKENS = 16  # OpenAI's default
_SEEDS = 2**63
_CHARACTERS_PER_TOKEN = 16  # more than in any text: a longer one is tokenized in part first
_SLACK = 64  # tokens that the end of a part may change

R = TypeVar("R", bound="Request")
Prompt = str | list[int]
_Stop = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > _MOST_METADATA:
        raise ValueError(f"has {len(value)} pairs, the limit is {_MOST_METADATA}")
    return value


_Metadata = Annotated[dict[str, Annotated[str, StringConstraints(max_length=512)]], BeforeValidator(_few)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, without effect


class Request(_Strict):
    """Fields that chats and completions have in common."""

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
    metadata: _Metadata | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, str] | None = None

    @classmethod
    def checked(cls, raw: dict[str, Any], limits: FrontSettings) -> dict[str, Any]:
        """Return the fields to validate. Raises ``BadRequest`` for one that is unsupported, or too large."""
        found = asked_for(raw, cls.model_fields, NEUTRAL)
        options = found.get("stream_options")
        if isinstance(options, dict):
            found["stream_options"] = asked_for(options, StreamOptions.model_fields, {}, "stream_options.")
        return found

    def to_generation_requests(
        self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int
    ) -> list[GenerationRequest]:
        """Return the answers to write, one or several.

        Args:
            tokenizer: The FM's tokenizer.
            limits: Limits on prompt and answer.
            room: Most tokens of prompt and answer together.

        Raises:
            BadRequest: A limit is exceeded.
            SessionRefused, ServiceFull: For a chat, see ``models.chat_template.rendered_chat``.
        """
        raise NotImplementedError

    def ask(
        self, prompt: tuple[int, ...], max_tokens: int, limits: FrontSettings, continues: bool = False
    ) -> GenerationRequest:
        """Return one generation request. Raises ``BadRequest`` if a limit is exceeded."""
        check_num_tokens(len(prompt), limits, self.prompt_field())
        if max_tokens > limits.max_answer_tokens:
            raise BadRequest(f"max_tokens is {max_tokens}, the limit is {limits.max_answer_tokens}", "max_tokens")
        sampling = Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbelow(_SEEDS) if self.seed is None else self.seed,
        )
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationRequest(self.model, prompt, sampling, stop, self.domain, self.speculate, continues)

    @classmethod
    def prompt_field(cls) -> str:
        """Name of the field that holds the prompt."""
        raise NotImplementedError


class TextPart(_Strict):
    """A text part of a message; the model can read no other kind."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @classmethod
    def checked(cls, raw: Any, where: str) -> Any:
        """Return the message to validate. Raises ``BadRequest`` for an unsupported field."""
        if not isinstance(raw, dict):
            return raw
        if raw.get("role") in FOREIGN_ROLES:
            raise unsupported(f"'{raw['role']}' is an OpenAI role", f"{where}.role")
        found = asked_for(raw, cls.model_fields, NEUTRAL_OF_MESSAGE, f"{where}.")
        parts = found.get("content")
        if isinstance(parts, list):
            found["content"] = [_part(part, f"{where}.content.{number}") for number, part in enumerate(parts)]
        return found

    def plain(self) -> dict[str, str]:
        """Return the message for a chat template."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


def _part(raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        return raw
    if raw.get("type") in FOREIGN_PARTS:
        raise unsupported(f"'{raw['type']}' is an OpenAI kind of content", f"{where}.type")
    return asked_for(raw, TextPart.model_fields, {}, f"{where}.")


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1), FailFast()]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @classmethod
    def prompt_field(cls) -> str:
        """See ``Request.prompt_field``."""
        return "messages"

    @classmethod
    def checked(cls, raw: dict[str, Any], limits: FrontSettings) -> dict[str, Any]:
        """See ``Request.checked``."""
        found = super().checked(raw, limits)
        messages = found.get("messages")
        if isinstance(messages, list):
            parts = [m["content"] for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list)]
            num = max(len(messages), sum(map(len, parts)))
            if num > limits.max_messages:
                found_here = f"messages holds {num} messages or parts of them, the limit is {limits.max_messages}"
                raise BadRequest(found_here, "messages")
            found["messages"] = [ChatMessage.checked(each, f"messages.{i}") for i, each in enumerate(messages)]
        return found

    def to_generation_requests(
        self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int
    ) -> list[GenerationRequest]:
        """See ``Request.to_generation_requests``."""
        messages = [message.plain() for message in self.messages]
        for message in messages:
            check_text(tokenizer, message["content"], limits, "messages")
        prompt = chat_ids(tokenizer, messages)
        asked = self.max_completion_tokens or self.max_tokens
        default = max(1, min(limits.default_chat_tokens, limits.max_answer_tokens, room - len(prompt)))
        return [self.ask(prompt, asked or default, limits)]


def _prompts(value: Any) -> list[Prompt]:
    """A string, token ids, or a list of either."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("should be a valid string, a list of token ids, or a list of either")
    if value and type(value[0]) is int:
        return [_ids(value)]
    return [each if isinstance(each, str) else _ids(each) for each in value]


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise ValueError("should be a valid string, a list of token ids, or a list of either")
    return value


class CompletionRequest(Request):
    """``POST /v1/completions``."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=1)

    @classmethod
    def prompt_field(cls) -> str:
        """See ``Request.prompt_field``."""
        return "prompt"

    @classmethod
    def checked(cls, raw: dict[str, Any], limits: FrontSettings) -> dict[str, Any]:
        """See ``Request.checked``."""
        found = super().checked(raw, limits)
        prompt = found.get("prompt")
        if not isinstance(prompt, list):
            return found
        if prompt and type(prompt[0]) is int:
            check_num_tokens(len(prompt), limits, "prompt")
        elif not 0 < len(prompt) <= limits.max_prompts:
            raise BadRequest(f"prompt holds {len(prompt)} prompts, send 1 to {limits.max_prompts}", "prompt")
        return found

    def to_generation_requests(
        self, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings, room: int
    ) -> list[GenerationRequest]:
        """See ``Request.to_generation_requests``."""
        return [
            self.ask(
                self._tokens(prompt, tokenizer, limits), self.max_tokens or _COMPLETION_TOKENS, limits, continues=True
            )
            for prompt in self.prompt
        ]

    def _tokens(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, limits: FrontSettings) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(prompt)
        check_text(tokenizer, prompt, limits, "prompt")
        return prompt_ids(tokenizer, prompt)


def check_num_tokens(num: int, limits: FrontSettings, param: str, more: str = "") -> None:
    """Raise ``BadRequest`` if a prompt has too many tokens."""
    if num > limits.max_prompt_tokens:
        found = f"the prompt has {more}{num} tokens, the limit is {limits.max_prompt_tokens}"
        raise BadRequest(found, param, "context_length_exceeded")


def check_text(tokenizer: PreTrainedTokenizerBase, text: str, limits: FrontSettings, param: str) -> None:
    """Raise ``BadRequest`` for a text that is far too long, before all of it is tokenized, which could take seconds."""
    length = limits.max_prompt_tokens * _CHARACTERS_PER_TOKEN
    if len(text) > length:
        check_num_tokens(len(prompt_ids(tokenizer, text[:length])) - _SLACK, limits, param, "more than ")


_KNOWN = {
    name
    for group in (ChatRequest, CompletionRequest, ChatMessage, TextPart, StreamOptions)
    for name in group.model_fields
}


def read_request(kind: type[R], body: bytes, limits: FrontSettings) -> R:
    """Parse a request from JSON. Raises ``BadRequest`` for the first error."""
    raw = kind.checked(_object(body, limits), limits)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # Of the errors of a union's members, one that is not about the type belongs to the intended member.
        first = min(error.errors(include_url=False, include_context=False), key=lambda e: e["type"].endswith("_type"))
        where = ".".join(str(part) for part in first["loc"] if part in _KNOWN or isinstance(part, int))
        raise BadRequest(f"{where}: {first['msg'].removeprefix('Value error, ')}", where) from None


def _object(body: bytes, limits: FrontSettings) -> dict[str, Any]:
    most = 3 * limits.max_messages + limits.max_prompts + strict_json.DEEPEST  # a message, its list and the part in it
    try:
        raw = strict_json.loads(body, most)
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise BadRequest("the body is not a JSON object", code="invalid_json")
    return raw
