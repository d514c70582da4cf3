"""A client of an OpenAI-compatible server: requests, and text as it arrives. Standard library only."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from gaisnet.errors import ServerRefused
from gaisnet.serving.http.callers import is_loopback

_TIMEOUT_S = 600.0  # a long prompt on a small machine
_LONGEST = 2**20  # bytes of a line of an answer, or of all of one that does not stream


class _NoRedirects(HTTPRedirectHandler):
    """Refuses redirects: another address would get the API key and the prompt."""

    def redirect_request(self, *args: Any, **named: Any) -> None:
        """Return no request, so that the redirect is reported as an error."""


def _opener(url: str) -> OpenerDirector:
    """Return an opener that asks this machine's own servers directly: a proxy would see everything."""
    host = urlsplit(url).hostname or ""
    return build_opener(_NoRedirects, *([ProxyHandler({})] if is_loopback(host) else []))


@dataclass
class Conversation:
    """Turns so far, and how to take the next one."""

    url: str  # with or without the /v1 at its end
    model: str
    key: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # more fields of every request
    plain: bool = False  # each line is a prompt of its own, as it stands
    turns: list[dict[str, str]] = field(default_factory=list)

    def models(self) -> list[str]:
        """Return names of the server's models. Raises ``ServerRefused``."""
        try:
            with self._open("models", None) as response:
                return [str(model["id"]) for model in json.loads(response.read(_LONGEST))["data"]]
        except (OSError, HTTPException, ValueError, TypeError, KeyError) as error:
            raise ServerRefused(self.url, f"it does not list its models ({type(error).__name__})") from error

    def say(self, text: str) -> Iterator[dict[str, Any]]:
        """Yield chunks of the answer, each with ``text`` and its ``gaisnet`` field. Raises ``ServerRefused``."""
        turns = [*self.turns, {"role": "user", "content": text}]
        asked = {"prompt": text} if self.plain else {"messages": turns}
        body = {**self.options, **asked, "model": self.model, "stream": True}
        answer = ""
        for chunk in self._events("completions" if self.plain else "chat/completions", body):
            answer += chunk["text"]
            yield chunk
        self.turns = [*turns, {"role": "assistant", "content": answer}]

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self._open(path, body) as response:
            try:
                while line := response.readline(_LONGEST):
                    data = line.decode("utf-8").strip().removeprefix("data: ")
                    if data == "[DONE]":
                        return
                    if data:
                        yield _read(json.loads(data))
            except (OSError, HTTPException, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
                raise ServerRefused(self.url, f"its answer broke off ({error})") from error
        raise ServerRefused(self.url, "its answer broke off")

    def _open(self, path: str, body: Mapping[str, Any] | None) -> HTTPResponse:
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return cast(HTTPResponse, _opener(url).open(Request(url, data, headers), timeout=_TIMEOUT_S))
        except HTTPError as error:
            raise ServerRefused(self.url, _said(error)) from error
        except (URLError, OSError, HTTPException, ValueError) as error:
            raise ServerRefused(self.url, f"it cannot be reached ({error})") from error


def _read(chunk: dict[str, Any]) -> dict[str, Any]:
    """Return the text of a chunk, of a chat or a completion, and our own field.

    Raises ``ServerRefused`` for an error.
    """
    if "error" in chunk:
        raise ServerRefused("the server", str(chunk["error"].get("message", "it failed")))
    choice = chunk["choices"][0] if chunk.get("choices") else {}
    text = choice.get("text") or choice.get("delta", {}).get("content") or ""
    course = chunk.get("gaisnet")
    return {"text": str(text), "gaisnet": course if isinstance(course, dict) else {}}


def _said(error: HTTPError) -> str:
    """Return the server's own words, if it has any."""
    try:
        return f"{json.loads(error.read(_LONGEST))['error']['message']} ({error.code})"
    except (ValueError, KeyError, TypeError, OSError):
        return f"it answers {error.code} {error.reason}"
