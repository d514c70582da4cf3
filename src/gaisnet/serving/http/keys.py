"""API keys, and the addresses that are this machine's own."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path

from gaisnet.errors import ConfigError

ENVIRONMENT = "GAISNET_API_KEYS"
_SHORTEST = 16


class ApiKeys:
    """Keys that callers must have one of; none means that nobody needs any. They are in no log and no message.

    Args:
        keys: As callers send them.

    Raises:
        ConfigError: One is short enough to be guessed.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        found = [key.strip() for key in keys]
        if any(len(key) < _SHORTEST for key in found):
            do = "make long ones: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
            raise ConfigError("API keys", f"one has fewer than {_SHORTEST} characters", do)
        self._digests = [_digest(key) for key in found]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._digests)

    def admit(self, authorization: str | None) -> bool:
        """Whether a request with this ``Authorization`` header may go on; in the same time for right and wrong keys."""
        if not self._digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(fits) and scheme.lower() == "bearer"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(path: Path | None) -> ApiKeys:
    """Keys of a file, one a line, '#' begins a comment; without a file those of $GAISNET_API_KEYS, with commas between.

    Raises ``ConfigError``, which names the file and no key.
    """
    return ApiKeys(_read(path))


def first_key(path: Path | None) -> str | None:
    """For a caller: the first of the same; None where there are none. Raises ``ConfigError``."""
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
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_bind(host: str, keys: ApiKeys) -> None:
    """Raise ``ConfigError`` where others than this machine could ask and no key is needed."""
    if not keys and not is_loopback(host):
        do = f"give --api-keys FILE or ${ENVIRONMENT}, or listen on 127.0.0.1"
        raise ConfigError(f"listening on '{host}'", "others reach it and no API keys are given", do)
