"""Admission of callers: API keys, programs on this machine, and web pages from allowed origins."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from gaisnet.errors import ConfigError
from gaisnet.serving.http.refusals import INVALID, Refusal

ENVIRONMENT = "GAISNET_API_KEYS"
_SHORTEST = 16


class ApiKeys:
    """Keys of which callers need one; with none, they need none. Keys appear in no log and no message.

    Args:
        keys: Keys as callers send them.

    Raises:
        ConfigError: A key is short enough to be guessed.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        found = [key.strip() for key in keys]
        if any(len(key) < _SHORTEST for key in found):
            do = "make long ones: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            raise ConfigError("API keys", f"one has fewer than {_SHORTEST} characters", do)
        self._digests = [_digest(key) for key in found]

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._digests)

    def admit(self, authorization: str | None) -> bool:
        """Return whether an ``Authorization`` header is valid, in constant time."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(fits) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path | None) -> ApiKeys:
    """Read keys from a file, or without one from $GAISNET_API_KEYS.

    A file has one key per line, and '#' begins a comment; the variable has commas between keys.
    Raises ``ConfigError``, which names the file and no key.
    """
    return ApiKeys(_read(path))


def first_key(path: Path | None) -> str | None:
    """Return the first key, for a caller; None if there is none. Raises ``ConfigError``."""
    return next(iter(_read(path)), None)


def _read(path: Path | None) -> list[str]:
    if path is None:
        return [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",") if key.strip()]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        do = "name a readable file with a key per line"
        raise ConfigError(f"API keys '{path}'", f"cannot be read ({type(error).__name__})", do) from None
    keys = [key for line in lines if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"API keys '{path}'", "the file holds none", "write a key per line")
    return keys


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: ApiKeys) -> None:
    """Raise ``ConfigError`` if others than this machine could ask without a key."""
    if not keys and not is_loopback(host):
        do = f"give --api-keys FILE or ${ENVIRONMENT}, or listen on 127.0.0.1"
        raise ConfigError(f"listening on '{host}'", "others reach it and no API keys are given", do)


ANY = "*"


class Callers:
    """Admits callers, or says why not.

    Args:
        keys: Keys of callers; with none, this machine's programs need none.
        origins: Origins of web pages whose scripts may ask; '*' for all.
    """

    def __init__(self, keys: ApiKeys, origins: Iterable[str] = ()) -> None:
        self._keys = keys
        self._origins = frozenset(origins)

    def admit(self, headers: Headers) -> None:
        """Raise ``Refusal`` unless a request with these headers may go on."""
        host = headers.get("host", "")
        if not self._keys and not is_loopback(_hostname(host)):  # a web page has pointed its own name at this machine
            raise Refusal(403, INVALID, "without API keys only this machine's own names are answered", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and not self._takes(origin, host):  # browsers send it, and scripts cannot forge it
            found = "a web page of another origin asks, and cors_origins does not name it"
            raise Refusal(403, INVALID, found, "wrong_origin")
        if not self._keys.admit(headers.get("authorization")):
            told = {"WWW-Authenticate": "Bearer"}
            raise Refusal(401, INVALID, "a known API key is needed", "invalid_api_key", headers=told)

    def _takes(self, origin: str, host: str) -> bool:
        """Return whether scripts of this origin may ask: an allowed one, or this server's own."""
        return ANY in self._origins or origin in self._origins or (bool(host) and origin == f"http://{host}")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
