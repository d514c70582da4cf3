"""Renders chat templates in a process of its own; run as a script, by ``models.chat_template``.

A template is a program that comes with a model, and may loop or grow without end. The operating system enforces its
limits: at the end of them the process is killed, whatever it is doing.

Each line of standard input is a request, each line of standard output its answer, both JSON.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

_LONGEST_REASON = 300


def main(cpu_s: int, memory_bytes: int, characters: int) -> None:
    """Answer requests until standard input ends.

    Args:
        cpu_s: CPU seconds for one template; beyond them SIGPROF ends this process.
        memory_bytes: Memory that a template may take beyond the process's own.
        characters: Longest text that may come out.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory(memory_bytes)
    _say({})  # ready; start-up does not count against a template
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = _answer(render_jinja_template, json.loads(line), characters)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(answer)


def _answer(render: Any, asked: dict[str, Any], characters: int) -> dict[str, str]:
    try:
        rendered, _ = render(
            conversations=[asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=True,
            **asked["special_tokens"],
        )
    except MemoryError:
        return {"refused": "it needs too much memory"}
    except Exception as error:  # a template is a program and may raise anything
        return {"refused": (str(error) or type(error).__name__)[:_LONGEST_REASON]}
    text = rendered[0]
    return {"refused": f"it writes more than {characters} characters"} if len(text) > characters else {"text": text}


def _limit_memory(size_bytes: int) -> None:
    with suppress(OSError, ValueError):  # on systems that do not report or limit it
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + size_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _say(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
