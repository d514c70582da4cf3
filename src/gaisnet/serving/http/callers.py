"""Admission of callers: with a key, or as programs on this machine; web pages only from allowed origins."""

from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from gaisnet.serving.http.keys import ApiKeys, is_loopback
from gaisnet.serving.http.refusals import INVALID, Refusal

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
