"""Requests in OpenAI's words: what is taken, what is named as theirs or as unknown, and how much any of it costs."""

import json
import threading
import time
from typing import Any, get_args, get_type_hints

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessage, ChatCompletionMessageParam
from openai.types.chat import completion_create_params as chats

from gaisnet.config import FrontSettings
from gaisnet.errors import SessionRefused
from gaisnet.serving.generation.text import Sampler
from gaisnet.serving.http.dialect import (
    LONGEST_STOP,
    NEUTRAL,
    ChatRequest,
    CompletionRequest,
    Request,
    read_request,
)
from gaisnet.serving.http.refusals import BadRequest
from tests.serving.servers import chat_tokenizer
from tests.serving.test_sampling import LOGITS

LIMITS = FrontSettings()
MIB = 2**20
HELLO = [{"role": "user", "content": "hello"}]


def complete(**fields: Any) -> CompletionRequest:
    return read_request(CompletionRequest, json.dumps({"model": "auto", "prompt": "a", **fields}).encode(), LIMITS)


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"model": "auto", "messages": HELLO, **fields}).encode(), LIMITS)


def refused(kind: type[Request], **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        (complete if kind is CompletionRequest else chat)(**fields)
    return raised.value


# -- OpenAI's own words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(chats.CompletionCreateParamsBase.__annotations__))
def test_every_field_of_openai_s_chats_is_taken_or_named_as_openai_s(name: str) -> None:
    if name in ChatRequest.model_fields:
        return
    error = refused(ChatRequest, **{name: "something" if name != "parallel_tool_calls" else 1})
    assert str(error) == f"'{name}' is an OpenAI field that this server does not support; leave it out"
    assert (error.param, error.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", sorted(completions.CompletionCreateParamsBase.__annotations__))
def test_every_field_of_openai_s_completions_is_taken_or_named_as_openai_s(name: str) -> None:
    if name not in CompletionRequest.model_fields:
        assert "is an OpenAI field" in str(refused(CompletionRequest, **{name: "something"}))


def test_other_fields_are_named_as_unknown() -> None:
    for fields in ({"top_k": 4}, {"max_completion_tokens": 4}, {"x" * 1000: 1}):
        error = refused(CompletionRequest, **fields)
        assert "is not a field of this request" in str(error)
        assert (error.param, error.code) == (next(iter(fields))[:80], "unknown_parameter")
    error = refused(ChatRequest, messages=[{**HELLO[0], "mood": "good"}])
    assert str(error) == "'messages.0.mood' is not a field of this request"
    assert "'stream_options.x'" in str(refused(ChatRequest, stream_options={"x": 1}))


def test_null_asks_for_nothing_wherever_it_stands() -> None:
    nulls = dict.fromkeys([*NEUTRAL, *CompletionRequest.model_fields, *ChatRequest.model_fields, "anything"])
    assert complete(**{**nulls, "model": "auto", "prompt": "a"}) == complete()
    assert chat(**{**nulls, "model": "auto", "messages": HELLO}) == chat()
    message = {**HELLO[0], **dict.fromkeys(("name", "refusal", "audio", "tool_calls", "reasoning_content"))}
    assert chat(messages=[message]) == chat()
    part = {"type": "text", "text": "hello", "image_url": None}
    assert chat(messages=[{"role": "user", "content": [part]}]).messages[0].plain() == HELLO[0]
    assert chat(stream_options={"include_usage": None}) == chat(stream_options={})
    for missing in ({"prompt": None}, {"model": None}):
        assert "required" in str(refused(CompletionRequest, **missing))


def test_a_second_turn_takes_the_first_one_s_answer_as_it_came() -> None:
    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": "hi", "refusal": None})
    for dumped in (answer.model_dump(), {**answer.model_dump(), "tool_calls": [], "annotations": []}):
        assert chat(messages=[*HELLO, dumped, *HELLO]).messages[1].plain() == {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "a", "tool_calls": [{"id": "1"}]},
        {"role": "assistant", "content": "a", "refusal": "no"},
        {"role": "tool", "content": "a", "tool_call_id": "1"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/"}}]},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
    ],
    ids=str,
)
def test_what_a_model_of_texts_cannot_read_is_named(message: dict[str, Any]) -> None:
    error = refused(ChatRequest, messages=[message])
    assert "is an OpenAI" in str(error)
    assert "this server does not support" in str(error)
    assert error.code == "unsupported_parameter"


def test_openai_s_roles_and_parts_are_known() -> None:
    roles = {get_args(get_type_hints(each)["role"])[0] for each in get_args(ChatCompletionMessageParam)}
    for role in map(str, roles):
        try:
            chat(messages=[{"role": role, "content": "a"}])
        except BadRequest as error:
            assert "is an OpenAI role" in str(error)
    assert len(get_args(ChatCompletionContentPartParam)) == 4  # text, and three that are FOREIGN_PARTS


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "num"), [("a", 1), ([3, 4], 1), (["a", "b", "c"], 3), ([[3, 4], [5]], 2), (["a", [5]], 2)]
)
def test_lists_of_prompts(prompt: Any, num: int) -> None:
    asks = complete(prompt=prompt, seed=3).to_generation_requests(chat_tokenizer(), LIMITS, 100)
    assert len(asks) == num
    assert {ask.sampling.seed for ask in asks} == {3}


@pytest.mark.parametrize(
    "prompt", [7, True, {}, [None], [[[]]], [1.5], [[1, None]], [True], ["a", 3], [3, "a"]], ids=str
)
def test_what_is_no_prompt(prompt: Any) -> None:
    error = refused(CompletionRequest, prompt=prompt)
    assert error.param == "prompt"
    assert "prompt" in str(error)


def test_too_much_of_a_good_thing() -> None:
    assert "prompt holds 33 prompts, send 1 to 32" in str(refused(CompletionRequest, prompt=["a"] * 33))
    assert "prompt holds 0 prompts" in str(refused(CompletionRequest, prompt=[]))
    assert refused(CompletionRequest, prompt=[1] * 4097).code == "context_length_exceeded"
    assert "4097 messages" in str(refused(ChatRequest, messages=HELLO * 4097))
    assert "at most 4 items" in str(refused(CompletionRequest, stop=["a"] * 5))
    assert complete(stop="a" * LONGEST_STOP).stop == "a" * LONGEST_STOP
    assert f"{LONGEST_STOP} characters" in str(refused(CompletionRequest, stop=["a" * (LONGEST_STOP + 1)]))
    assert "17 pairs" in str(refused(CompletionRequest, metadata={str(i): "a" for i in range(17)}))


# -- numbers -----------------------------------------------------------------------------------------------------------

NUMBERS: tuple[str, ...] = (
    *("0", "-0.0", "1", "2", "0.5", "1.0", "2.5", "-1", "-1.5", "true", "false", '"1"', "[]", "{}", "[1]", "null"),
    *("1e-320", "5e-324", "1e-400", "1e-45", "1e-38", "1.7e308", "-1.7e308", "1e400", "-1e400", "NaN", "Infinity"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" + "0" * 400),
)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "n", "top_logprobs", "best_of"]
)
def test_any_number_is_answered_or_refused(field: str, number: str) -> None:
    kind = ChatRequest if field == "max_completion_tokens" else CompletionRequest
    prompt = '"messages": [{"role": "user", "content": "a"}]' if kind is ChatRequest else '"prompt": "a"'
    body = f'{{"model": "auto", {prompt}, "{field}": {number}}}'.encode()
    try:
        asks = read_request(kind, body, LIMITS).to_generation_requests(chat_tokenizer(), LIMITS, 100)
    except (BadRequest, SessionRefused):
        return
    sampler = Sampler(asks[0].sampling)
    probabilities = sampler.probabilities(LOGITS)
    assert probabilities.isfinite().all()
    assert 0 <= sampler.draw(probabilities) < len(LOGITS)


# -- what it costs -----------------------------------------------------------------------------------------------------


MANY = ",".join(f'"{i:x}": 1' for i in range(80_000))


def filled(item: str) -> str:
    return ",".join([item] * (MIB // (len(item) + 1)))


BOMBS = {
    "prompts": f'"prompt": [{filled("null")}]',
    "lists": f'"prompt": [{filled("[]")}]',
    "objects": f'"prompt": [{filled("{}")}]',
    "floats": f'"prompt": [[{filled("1.5")}]]',
    "stops": f'"prompt": "a", "stop": [{filled("null")}]',
    "long stops": f'"prompt": "a", "stop": {json.dumps(["ab" * 125_000] * 4)}',
    "fields": f'"prompt": "a", {MANY}',
    "metadata": f'"prompt": "a", "metadata": {{{MANY}}}',
    "text": f'"prompt": "{"a" * MIB}"',
    "messages": f'"messages": [{filled("{}")}]',
    "null messages": f'"messages": [{filled("null")}]',
    "parts": f'"messages": [{{"role": "user", "content": [{filled("{}")}]}}]',
    "logit_bias": f'"prompt": "a", "logit_bias": {{{MANY}}}',
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_mebibyte_of_anything_is_refused_at_once_and_keeps_nobody(name: str) -> None:
    body = f'{{"model": "auto", {BOMBS[name]}}}'.encode()
    kind = ChatRequest if "messages" in BOMBS[name] else CompletionRequest
    longest, done = 0.0, threading.Event()

    def look() -> None:
        """How long another thread is kept from running, as the event loop would be."""
        nonlocal longest
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now

    other = threading.Thread(target=look)
    other.start()
    begun = time.process_time()
    with pytest.raises(BadRequest):
        read_request(kind, body, LIMITS).to_generation_requests(chat_tokenizer(), LIMITS, 100)
    taken = time.process_time() - begun
    done.set()
    other.join()
    assert taken < 5  # up to 55 s, where everything that is wrong is collected
    assert longest < 5
