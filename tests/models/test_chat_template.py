"""Chats as text: what transformers renders, and bounds for templates that have none."""

import json
import signal
from collections.abc import Iterator

import pytest

from gaisnet.errors import ServiceFull, SessionRefused
from gaisnet.models import chat_template
from gaisnet.models.chat_template import rendered_chat
from tests.tiny import tiny_tokenizer

MESSAGES = [{"role": "system", "content": "Be <s>brief</s>."}, {"role": "user", "content": "Ünïcode 😀\n{{ 7 * 7 }}"}]
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """Limits that are reached sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "CPU_S", 1)
        patch.setattr(chat_template, "CHARACTERS", 2**20)
        chat_template._RENDERER.close()
        yield
    chat_template._RENDERER.close()


def rendered(template: str) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return rendered_chat(tokenizer, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if loop.last %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ m | tojson }}{% endfor %}{{ ns.n }}",
        "{% if tools is defined and tools %}never{% endif %}{{ messages | length }}",
    ],
)
def test_it_is_what_transformers_renders(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert rendered(template) == expected


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('begin with a user') }}", "begin with a user"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.nothing.at_all }}", "has no attribute"),
        ("{% for %}", "Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('x' * 10000) }}", "xxx"),
    ],
)
def test_a_template_that_fails_refuses_the_chat(template: str, said: str) -> None:
    with pytest.raises(SessionRefused, match=said) as raised:
        rendered(template)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{{ 3 ** 99999999 }}",  # a single operation, which nothing in the same process could break off
        "{{ 'x' * 10 ** 10 }}",
        "{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    ],
)
@pytest.mark.usefixtures("narrow")
def test_a_template_without_end_is_ended_and_the_next_chat_is_rendered(template: str) -> None:
    with pytest.raises(SessionRefused, match="takes more than 1 s|too much memory|more than 1048576 characters"):
        rendered(template)
    assert rendered("{{ messages[0].role }}") == "system"


@pytest.mark.parametrize("command", ["/bin/false", "/nowhere"])
def test_a_chat_is_put_off_where_no_process_can_render_it(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chat_template._RENDERER.close()
    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", command)
        with pytest.raises(ServiceFull, match="a chat: "):
            rendered("{{ messages[0].role }}")
    assert rendered("{{ messages[0].role }}") == "system"


def test_ctrl_c_at_the_terminal_does_not_reach_the_process_that_renders() -> None:
    rendered("{{ messages[0].role }}")
    process = chat_template._RENDERER._process
    assert process is not None
    process.send_signal(signal.SIGINT)
    assert rendered("{{ messages[0].role }}") == "system"
    assert chat_template._RENDERER._process is process


def test_the_process_that_renders_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAISNET_API_KEYS", "a-key-that-nobody-else-may-know")
    chat_template._RENDERER.close()
    rendered("{{ messages[0].role }}")
    process = chat_template._RENDERER._process
    assert process is not None
    with open(f"/proc/{process.pid}/environ", "rb") as environment:
        assert b"a-key-that" not in environment.read()
    assert json.dumps(process.args).count("chat_renderer") == 1
