"""Chats rendered as text by the model's own template, within limits of time, memory and length.

A template is a program by the model's author. It runs in transformers' sandbox, which keeps it from files and Python's
internals, and in a process of its own (``models.chat_renderer``), which is killed if it takes too long.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from gaisnet.errors import ServiceFull, SessionRefused

CPU_S = 2
"""CPU seconds of a template for one chat."""
MEMORY_BYTES = 2**28
"""Memory of a template."""
CHARACTERS = 2**22
"""Length of the text that a template may write."""

_WAIT_S = 10.0  # for earlier chats
_SCRIPT = Path(__file__).with_name("chat_renderer.py")
_KEPT = ("PATH", "PYTHONPATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH")


def rendered_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> str:
    """Render a chat as text, up to where the assistant's next message begins.

    Args:
        tokenizer: Carries the template.
        messages: ``role`` and ``content`` of each.

    Raises:
        SessionRefused: The tokenizer has no template; or the template refuses these messages, fails, or exceeds its
            limits of time, memory or length.
        ServiceFull: Other chats take all the time; or no process can be started.
    """
    if not tokenizer.chat_template:
        found, do = "the model's tokenizer has no chat template", "use a completion, or a model made for chats"
        raise SessionRefused("a chat", found, do)
    answer = _RENDERER.ask(
        {
            "template": tokenizer.get_chat_template(),
            "messages": list(map(dict, messages)),
            "special_tokens": tokenizer.special_tokens_map,
        }
    )
    if "refused" in answer:
        raise SessionRefused("a chat", f"the model's template refuses it ({answer['refused']})", "change the messages")
    return answer["text"]


class _Renderer:
    """The process that renders. It starts when first needed, and again after a template has killed it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def ask(self, asked: Mapping[str, Any]) -> dict[str, str]:
        """Answer a request. Raises ``ServiceFull`` or ``SessionRefused``."""
        if not self._lock.acquire(timeout=_WAIT_S):
            raise ServiceFull("a chat", f"chats before it have taken {_WAIT_S:.0f} s to be rendered")
        try:
            if self._process is None or self._process.poll() is not None:
                self._process = self._started()
            return self._exchanged(self._process, json.dumps(asked, default=str).encode() + b"\n")
        finally:
            self._lock.release()

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _started(self) -> subprocess.Popen[bytes]:
        """Return a ready process, without this one's secrets. Raises ``ServiceFull``."""
        command = [sys.executable, "-P", str(_SCRIPT), str(CPU_S), str(MEMORY_BYTES), str(CHARACTERS)]
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # each thread would reserve memory
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        except OSError as error:
            raise ServiceFull("a chat", f"no process can be started to render it ({error.strerror})") from error
        if "refused" in _line_of(process):
            raise ServiceFull("a chat", "the process that renders it ended before it was ready")
        return process

    def _exchanged(self, process: subprocess.Popen[bytes], line: bytes) -> dict[str, str]:
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the next line reports the end
        return _line_of(process)


def _line_of(process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Read the next answer of the process, or report its end."""
    assert process.stdout is not None
    line = process.stdout.readline(16 * CHARACTERS)
    if line.endswith(b"\n"):
        answer: dict[str, str] = json.loads(line)
        return answer
    _end(process)
    return {"refused": f"it takes more than {CPU_S} s of the processor, or breaks the process that renders it"}


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with suppress(BrokenPipeError), process:  # closes both pipes (one may hold unread bytes) and waits
        pass


_RENDERER = _Renderer()
