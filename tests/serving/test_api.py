"""The HTTP API, asked by OpenAI's own client over loopback."""

import json
import logging
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from gaisnet.config import FrontSettings, ServiceSettings
from tests.serving.servers import RunningServer, running_server, until
from tests.tiny import tiny_tokenizer

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], **GREEDY}
KEY = "sk-of-the-tests-0123456789"


def client(at: RunningServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{at.url}/v1", api_key=key, max_retries=0, timeout=280)


def ours(response: Any) -> dict[str, Any]:
    said: dict[str, Any] = response.gaisnet
    return said


def post(at: RunningServer, path: str = "completions", **sent: Any) -> httpx.Response:
    return httpx.post(f"{at.url}/v1/{path}", timeout=280, **sent)


def metric(at: RunningServer, line: str) -> float:
    """A sample out of /metrics; 0 where it is not there."""
    text = httpx.get(f"{at.url}/metrics").text
    return next((float(found.split()[-1]) for found in text.splitlines() if found.startswith(line + " ")), 0.0)


@pytest.fixture(scope="module")
def up() -> Iterator[RunningServer]:
    """A server for all tests that leave it as it was."""
    with running_server(threshold=0.0) as at:
        yield at


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing that a test broke stays broken, and no session is left."""
    yield
    if "up" in request.fixturenames:
        at: RunningServer = request.getfixturevalue("up")
        at.bodies.trouble, at.bodies.cloud_away = None, False
        at.bodies.wait_until_free()


# -- answers -----------------------------------------------------------------------------------------------------------


def test_models(up: RunningServer) -> None:
    asked = client(up)
    names = ["auto", "foundation", "merged", "shapes", "tastes"]
    assert [model.id for model in asked.models.list()] == names
    merged: Any = asked.models.retrieve("merged")
    assert (merged.id, merged.max_model_len) == ("merged", up.answering.context)
    assert httpx.get(f"{up.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("model", ["auto", "foundation", "merged", "shapes", "tastes"])
def test_a_chat_streaming_or_not(up: RunningServer, model: str) -> None:
    whole = client(up).chat.completions.create(model=model, **HELLO)
    choice = whole.choices[0]
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (11, 12)  # <s>u:hello<s>a:
    options: Any = {"include_usage": True}
    chunks = list(client(up).chat.completions.create(model=model, stream=True, stream_options=options, **HELLO))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {c.id for c in chunks} == {chunks[0].id} != {whole.id}
    assert ours(whole) == ours(chunks[-2])
    assert ours(whole)["body"] == ("cloud" if model in ("foundation", "merged") else "edge")


def test_a_completion_streaming_or_not(up: RunningServer) -> None:
    whole = client(up).completions.create(model="tastes", prompt="sweet", **GREEDY)
    chunks = list(client(up).completions.create(model="tastes", prompt="sweet", stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text != ""
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    ids: Any = list(b"sweet")  # one token per byte, in another order
    as_ids = tiny_tokenizer().encode("sweet", add_special_tokens=False)
    for prompt in (as_ids, [as_ids], ["sweet"]):
        again = client(up).completions.create(model="tastes", prompt=prompt, **GREEDY)
        assert again.choices[0].text == whole.choices[0].text
    assert len(ids) == len(as_ids)
    short = client(up).completions.create(model="tastes", prompt="sweet", temperature=0)
    assert short.usage is not None
    assert short.usage.completion_tokens == 16


def test_prompts_of_one_request_have_a_choice_each(up: RunningServer) -> None:
    prompts = ["sweet", "sour", "salt"]
    alone = [client(up).completions.create(model="tastes", prompt=p, **GREEDY) for p in prompts]
    whole = client(up).completions.create(model="tastes", prompt=prompts, **GREEDY)
    assert [(c.index, c.text) for c in whole.choices] == [(i, a.choices[0].text) for i, a in enumerate(alone)]
    assert [c.finish_reason for c in whole.choices] == ["length"] * 3
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(map(len, prompts))
    assert (whole.usage.completion_tokens, whole.usage.total_tokens) == (36, 36 + sum(map(len, prompts)))
    assert [ours(choice)["body"] for choice in whole.choices] == ["edge"] * 3
    options: Any = {"include_usage": True}
    chunks = list(
        client(up).completions.create(model="tastes", prompt=prompts, stream=True, stream_options=options, **GREEDY)
    )
    texts, ends = ["", "", ""], [0, 0, 0]
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        texts[choice.index] += choice.text
        ends[choice.index] += choice.finish_reason == "length"
    assert (texts, ends) == ([c.text for c in whole.choices], [1, 1, 1])
    assert chunks[-1].usage == whole.usage


def test_prompts_of_one_request_wait_for_room_and_fail_together() -> None:
    with running_server(settings=FrontSettings(max_answers=2, max_prompts=5)) as at:
        whole = client(at).completions.create(model="tastes", prompt=["a", "b", "c", "d", "e"], **GREEDY)
        assert [choice.index for choice in whole.choices] == [0, 1, 2, 3, 4]
        assert all(choice.text for choice in whole.choices)
        error = refused(post(at, json={"model": "auto", "prompt": ["a", "", "c"]}), 400)
        assert "it has no tokens" in error["message"]
        at.bodies.wait_until_free()


def test_a_second_turn_of_a_chat(up: RunningServer) -> None:
    first = client(up).chat.completions.create(model="shapes", **HELLO).choices[0].message
    turns: Any = [*HELLO["messages"], first.model_dump(), *HELLO["messages"]]
    plain: Any = [*HELLO["messages"], {"role": "assistant", "content": first.content}, *HELLO["messages"]]
    second = [
        client(up).chat.completions.create(model="shapes", messages=each, max_tokens=4, temperature=0)
        for each in (turns, plain)
    ]
    assert second[0].choices[0].message.content == second[1].choices[0].message.content


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/auto"])
def test_head_says_what_get_would(up: RunningServer, path: str) -> None:
    head, whole = httpx.head(up.url + path), httpx.get(up.url + path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_stop_strings_and_seeds(up: RunningServer) -> None:
    ask = client(up).completions.create
    text = ask(model="shapes", prompt="round", **GREEDY).choices[0].text
    for stop in (text[3:5], ["never there", text[3:5]]):
        cut = ask(model="shapes", prompt="round", stop=stop, **GREEDY).choices[0]
        assert (cut.text, cut.finish_reason) == (text[: text.index(text[3:5])], "stop")
    drawn = [ask(model="shapes", prompt="round", seed=s, max_tokens=12).choices[0].text for s in (4, 4, 5)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({ask(model="shapes", prompt="round", max_tokens=12).choices[0].text for _ in range(3)}) > 1


def test_parts_of_a_message_are_one_text(up: RunningServer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages: Any = [{"role": "user", "content": parts}]
    apart = client(up).chat.completions.create(model="shapes", **{**HELLO, "messages": messages})
    assert apart.choices[0].message.content == (
        client(up).chat.completions.create(model="shapes", **HELLO).choices[0].message.content
    )


def test_our_own_fields(up: RunningServer) -> None:
    ask = client(up).chat.completions.create
    other = ask(model="auto", extra_body={"domain": "tastes"}, **HELLO)
    assert other.choices[0].message.content == ask(model="tastes", **HELLO).choices[0].message.content
    fast = ask(model="auto", extra_body={"speculate": True}, **HELLO)
    said = ours(fast)
    assert (said["body"], said["domain"], said["escalated_at"]) == ("cloud", "shapes", None)
    assert 0 <= said["accepted"] <= said["drafted"]
    assert said["checks"] >= 1


def test_an_escalated_answer_says_where() -> None:
    with running_server(policy="always") as at:
        before = metric(at, "gaisnet_escalations_total")
        whole = client(at).chat.completions.create(model="auto", **HELLO)
        assert ours(whole) == {"body": "cloud", "domain": "shapes", "escalated_at": 0}
        until(lambda: metric(at, "gaisnet_escalations_total") == before + 1)
        at.bodies.cloud_away = True
        alone = client(at).chat.completions.create(model="auto", **HELLO)
        assert ours(alone) == {"body": "edge", "domain": "shapes", "escalated_at": None, "cloud_refused": True}
        assert alone.choices[0].message.content == (
            client(at).chat.completions.create(model="shapes", **HELLO).choices[0].message.content
        )


def test_many_at_once_get_what_each_gets_alone(up: RunningServer) -> None:
    prompts = [f"question {i}" for i in range(12)]

    def ask(prompt: str) -> str:
        text: str = client(up).completions.create(model="auto", prompt=prompt, **GREEDY).choices[0].text
        return text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(ask, prompts)) == alone


# -- what cannot be answered -------------------------------------------------------------------------------------------


def refused(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, whose shape is OpenAI's."""
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("changes", "param", "said"),
    [
        ({"n": 2}, "n", "does not support"),
        ({"logprobs": 0}, "logprobs", "does not support"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "does not support"),
        ({"echo": True}, "echo", "does not support"),
        ({"presence_penalty": 0.5}, "presence_penalty", "does not support"),
        ({"temprature": 1}, "temprature", "is not a field"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"max_tokens": 5000}, "max_tokens", "the limit is 1024"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"model": 5}, "model", "valid string"),
        ({"prompt": []}, "prompt", "holds 0 prompts"),
        ({"prompt": 7}, "prompt", "valid"),
        ({"prompt": ""}, None, "it has no tokens"),
        ({"prompt": [3, 9999]}, None, "token ids that the model lacks"),
        ({"domain": 3}, "domain", "valid string"),
        ({"model": "shapes", "domain": "tastes"}, None, "with 'auto' only"),
        ({"model": "shapes", "speculate": True}, None, "is the model that drafts"),
    ],
    ids=str,
)
def test_bad_fields(up: RunningServer, changes: dict[str, Any], param: str | None, said: str) -> None:
    error = refused(post(up, json={"model": "auto", "prompt": "a", **changes}), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


@pytest.mark.parametrize("field", ["n", "logprobs", "logit_bias", "temperature", "stop", "seed", "suffix", "stream"])
def test_null_asks_for_nothing(up: RunningServer, field: str) -> None:
    assert post(up, json={"model": "auto", "prompt": "a", "max_tokens": 1, field: None}).status_code == 200


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"nothing", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000], ids=repr
)
def test_what_is_no_json_object(up: RunningServer, content: bytes) -> None:
    assert refused(post(up, content=content), 400)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        ([], "messages", "at least 1"),
        ("hello", "messages", "valid list"),
        ([{"role": "user"}], "messages.0.content", "required"),
        ([{"role": "wizard", "content": "a"}], "messages.0.role", "'user'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], None, ""),
        ([{"role": "assistant", "content": "a"}], None, "begin with a user"),
    ],
)
def test_bad_messages(up: RunningServer, messages: Any, param: str | None, said: str) -> None:
    error = refused(post(up, "chat/completions", json={"model": "auto", "messages": messages}), 400)
    assert said in error["message"]
    if param is not None:
        assert error["param"] == param


def test_a_model_without_a_chat_template() -> None:
    with running_server(tokenizer=tiny_tokenizer()) as at:
        with pytest.raises(openai.BadRequestError, match="no chat template; use a completion"):
            client(at).chat.completions.create(model="auto", **HELLO)
        assert client(at).completions.create(model="auto", prompt="a", **GREEDY).choices[0].text


def test_unknown_models_and_paths(up: RunningServer) -> None:
    for sent in ({"model": "gpt-5"}, {"model": "auto", "domain": "smells"}):
        error = refused(post(up, json={"prompt": "a", **sent}), 404)
        assert error["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="served are: auto, foundation"):
        client(up).models.retrieve("gpt-5")
    refused(httpx.get(f"{up.url}/v1/embeddings"), 404)
    refused(httpx.get(f"{up.url}/v1/completions"), 405)


def test_a_prompt_over_the_context(up: RunningServer) -> None:
    for asked in ({"prompt": "a" * 200}, {"prompt": "a" * 100, "max_tokens": 100}):
        error = refused(post(up, json={"model": "auto", **asked}), 400)
        assert error["code"] == "context_length_exceeded"


def test_limits_of_size() -> None:
    settings = FrontSettings(max_body_bytes=1024, max_prompt_tokens=20, max_answer_tokens=10)
    with running_server(settings=settings) as at:
        assert refused(post(at, json={"model": "auto", "prompt": "a" * 2000}), 413)["code"] == "body_too_large"
        parts = (b"a" * 600 for _ in range(3))  # without a length
        refused(post(at, content=parts), 413)
        error = refused(post(at, json={"model": "auto", "prompt": "a" * 21}), 400)
        assert error["message"] == "the prompt has 21 tokens, the limit is 20"
        chat = client(at).chat.completions.create(model="auto", messages=HELLO["messages"], temperature=0)
        assert chat.usage is not None
        assert chat.usage.completion_tokens <= 10


def test_no_memory_for_a_session() -> None:
    with running_server(threshold=0.0, service=ServiceSettings(max_sessions=1)) as at:
        at.bodies.trouble = "waits", 6
        with client(at).completions.create(model="auto", prompt="a", stream=True, **GREEDY) as first:
            next(iter(first))
            response = post(at, json={"model": "auto", "prompt": "a"})
            assert refused(response, 503)["code"] == "overloaded"
            assert "Retry-After" in response.headers
        at.bodies.wait_until_free()


# -- what goes wrong on the way ----------------------------------------------------------------------------------------


def test_a_body_that_cannot_be_had(up: RunningServer) -> None:
    up.bodies.cloud_away = True
    for stream in (False, True):
        response = post(up, json={"model": "foundation", "prompt": "a", "stream": stream})
        assert "10.1.2.3" not in response.text
        assert refused(response, 503)["code"] == "unavailable"
        assert "Retry-After" in response.headers


def test_a_body_that_drops_between_two_tokens(up: RunningServer) -> None:
    up.bodies.trouble = "lost", 4
    response = post(up, json={"model": "shapes", "prompt": "hello", **GREEDY})
    assert "10.1.2.3" not in response.text
    refused(response, 503)
    events = post(up, json={"model": "shapes", "prompt": "hello", "stream": True, **GREEDY})
    assert events.status_code == 200
    *pieces, last = [json.loads(line.removeprefix("data: ")) for line in events.text.split("\n\n") if line]
    assert len(pieces) >= 1
    assert last["error"]["code"] == "unavailable"
    with pytest.raises(openai.APIError, match="cannot be had"):
        list(client(up).completions.create(model="shapes", prompt="hello", stream=True, **GREEDY))


def test_our_own_mistakes_are_told_to_the_log_only(
    up: RunningServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("a secret of the inside")

    monkeypatch.setattr(up.answering, "begin", broken)
    with caplog.at_level(logging.ERROR, logger="gaisnet"):
        response = post(up, json={"model": "auto", "prompt": "a private prompt"})
    assert refused(response, 500)["code"] == "internal_error"
    assert "secret" not in response.text
    assert "a secret of the inside" in caplog.text
    assert "a private prompt" not in caplog.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_session_and_disturbs_nobody(up: RunningServer, stream: bool) -> None:
    def gone() -> float:
        return metric(up, 'gaisnet_requests_total{body="edge",model="auto",status="499"}')

    before = gone()
    up.bodies.trouble = "waits", 6  # it would never end by itself
    with socket.create_connection(("127.0.0.1", int(up.url.rpartition(":")[2]))) as connection:
        body = json.dumps({"model": "auto", "prompt": "a", "stream": stream, **GREEDY})
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        until(lambda: up.bodies.num_sessions == 1)
        if stream:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    up.bodies.wait_until_free()
    up.bodies.trouble = None
    assert client(up).completions.create(model="auto", prompt="a", **GREEDY).choices[0].text
    until(lambda: gone() == before + 1)


def test_others_go_on_while_one_waits(up: RunningServer) -> None:
    up.bodies.trouble = "waits", 6
    with client(up).completions.create(model="auto", prompt="a", stream=True, **GREEDY) as waiting:
        next(iter(waiting))
        up.bodies.trouble = None
        assert client(up).completions.create(model="auto", prompt="b", **GREEDY).choices[0].text


def test_too_many_at_once() -> None:
    with running_server(settings=FrontSettings(max_answers=1)) as at:
        at.bodies.trouble = "waits", 6
        with client(at).completions.create(model="auto", prompt="a", stream=True, **GREEDY) as first:
            next(iter(first))
            response = post(at, json={"model": "auto", "prompt": "b"})
            assert refused(response, 429)["code"] == "rate_limit_exceeded"
            assert response.headers["Retry-After"] == "1"
            with pytest.raises(openai.RateLimitError):
                client(at).completions.create(model="auto", prompt="b")
        at.bodies.trouble = None
        until(lambda: post(at, json={"model": "auto", "prompt": "b"}).status_code == 200)


# -- who may ask -------------------------------------------------------------------------------------------------------


def test_keys() -> None:
    with running_server(keys=("another-key-of-the-tests", KEY)) as at:
        assert client(at, KEY).completions.create(model="auto", prompt="a", **GREEDY).choices[0].text
        for key in ("wrong", KEY + "x", KEY[:-1], "other"):
            with pytest.raises(openai.AuthenticationError):
                client(at, key).models.list()
        for path in ("/v1/models", "/metrics"):
            response = httpx.get(at.url + path)
            assert refused(response, 401)["code"] == "invalid_api_key"
            assert response.headers["WWW-Authenticate"] == "Bearer"
        refused(post(at, json={"model": "auto", "prompt": "a"}, headers={"Authorization": f"Basic {KEY}"}), 401)
        refused(post(at, content=b"{", headers={"Authorization": "Bearer wrong"}), 401)  # before anything is read
        assert httpx.get(f"{at.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),  # another server of this machine is another origin, too
        ({"Origin": "https://evil.example", "Content-Type": "text/plain"}, 403),  # sent without asking before
        ({}, 200),
    ],
    ids=str,
)
def test_web_pages_of_other_origins_are_refused(up: RunningServer, headers: dict[str, str], status: int) -> None:
    sent = json.dumps({"model": "auto", "prompt": "a", "max_tokens": 1})
    response = post(up, content=sent, headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers
    if status == 403:
        assert refused(response, 403)["code"] == "wrong_origin"
    own = post(up, content=sent, headers={"Origin": up.url})
    assert own.status_code == 200


def test_origins_that_the_settings_name_may_ask() -> None:
    page = "https://chat.example"
    with running_server(settings=FrontSettings(cors_origins=(page,))) as at:
        before = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-a"}
        asked = httpx.options(f"{at.url}/v1/completions", headers=before)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, page)
        assert asked.headers["access-control-allow-headers"] == "x-a"
        answer = post(at, json={"model": "auto", "prompt": "a", "max_tokens": 1}, headers={"Origin": page})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page)
        other = {"Origin": "https://evil.example"}
        assert httpx.options(f"{at.url}/v1/completions", headers={**before, **other}).status_code == 400
        refused(post(at, json={"model": "auto", "prompt": "a"}, headers=other), 403)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "[", "127.0.0.1.evil.example"])
def test_without_keys_only_names_of_this_machine_are_answered(up: RunningServer, host: str) -> None:
    refused(post(up, json={"model": "auto", "prompt": "a"}, headers={"Host": host}), 403)


# -- figures -----------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    with running_server(threshold=0.0) as at:
        client(at).completions.create(model="auto", prompt="abc", **GREEDY)
        client(at).completions.create(model="foundation", prompt="abc", extra_body={"speculate": True}, **GREEDY)
        post(at, json={"model": "auto", "prompt": "a", "n": 2})
        post(at, json={"model": "no such model", "prompt": "a"})
        until(lambda: metric(at, "gaisnet_answers") == 0)
        expected = {
            'gaisnet_requests_total{body="edge",model="auto",status="200"}': 1,
            'gaisnet_requests_total{body="cloud",model="foundation",status="200"}': 1,
            'gaisnet_requests_total{body="none",model="none",status="400"}': 1,
            'gaisnet_requests_total{body="none",model="none",status="404"}': 1,
            'gaisnet_tokens_total{kind="prompt",model="auto"}': 3,
            'gaisnet_tokens_total{kind="answer",model="auto"}': 12,
            'gaisnet_time_to_first_token_seconds_count{model="auto"}': 1,
            'gaisnet_time_between_tokens_seconds_count{model="auto"}': 11,
            "gaisnet_sessions": 0,
        }
        assert {line: metric(at, line) for line in expected} == expected
        drafted, accepted = (metric(at, f"gaisnet_{name}_tokens_total") for name in ("drafted", "accepted"))
        assert drafted > 0
        assert 0 <= accepted <= drafted
