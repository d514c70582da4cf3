"""Seals on messages between the cloud and one edge, since NVFlare lets every site write to every other one.

NVFlare delivers the message of any site with a certificate, under the name that this site claims. So cloud and
edge share a secret that no other kit holds, and each of their messages carries a MAC made with it. The MAC covers the
job too: a message sealed for one job is invalid in the next. Within a job it does not prevent repetition;
``exchange`` executes a request once per lifetime of the edge's job process.

Knows neither NVFlare nor torch.
"""

import hmac
import logging
import threading
import time
from collections.abc import Iterator, Mapping

from gaisnet.engines.nvflare.exchange import REFUSED, Fields, Post, Take

_SEAL = "seal"
_WARN_EVERY_S = 60.0
_logger = logging.getLogger(__name__)


class Seal:
    """Seals messages between the cloud and an edge, in one job.

    Args:
        secret: 32 bytes that only the kits of the two hold.
        edge: Name of the edge.
        job: NVFlare's id of the job.
    """

    def __init__(self, secret: bytes, edge: str, job: str) -> None:
        self._secret = secret
        self._edge = edge
        self._job = job

    def put_on(self, topic: str, fields: Fields) -> Fields:
        """Return the message with a seal."""
        return {**fields, _SEAL: self._mac(topic, fields)}

    def is_on(self, topic: str, fields: Mapping[str, object]) -> bool:
        """Return whether the sender of a message holds the secret, and it is unchanged. Accepts any fields."""
        found = fields.get(_SEAL)
        rest = {name: value for name, value in fields.items() if name != _SEAL}
        if not isinstance(found, bytes) or not _is_fields(rest):
            return False
        return hmac.compare_digest(found, self._mac(topic, rest))

    def _mac(self, topic: str, fields: Mapping[str, object]) -> bytes:
        mac = hmac.new(self._secret, digestmod="sha256")
        for part in (topic, self._edge, self._job, *_parts(fields)):
            # With its kind and length before it, no part can be taken for another or for a piece of one.
            raw = part if isinstance(part, bytes) else part.encode(errors="surrogatepass")
            mac.update(b"%c%d:" % (b"b" if isinstance(part, bytes) else b"s", len(raw)))
            mac.update(raw)
        return mac.digest()


def _is_fields(fields: Mapping[str, object]) -> bool:
    return all(isinstance(name, str) and isinstance(value, bytes | str) for name, value in fields.items())


def _parts(fields: Mapping[str, object]) -> Iterator[bytes | str]:
    for name in sorted(fields):
        value = fields[name]
        assert isinstance(value, bytes | str)
        yield name
        yield value


class SealedPost:
    """A ``Post`` that seals what it sends through another one."""

    def __init__(self, post: Post, seal: Seal) -> None:
        self._post = post
        self._seal = seal

    def __call__(self, topic: str, fields: Fields, timeout_s: float) -> Fields | None:
        """See ``Post``."""
        return self._post(topic, self._seal.put_on(topic, fields), timeout_s)


class Guard:
    """Passes sealed messages of one topic on to their handler, and drops all others.

    Args:
        topic: The topic.
        take: Handles its messages.
        seal: The required seal.
    """

    def __init__(self, topic: str, take: Take, seal: Seal) -> None:
        self._topic = topic
        self._take = take
        self._seal = seal
        self._lock = threading.Lock()
        self._warned_at = -_WARN_EVERY_S

    def __call__(self, fields: Mapping[str, object]) -> Fields:
        """Return the reply."""
        if self._seal.is_on(self._topic, fields):
            return self._take(fields)
        self._warn()
        return REFUSED

    def _warn(self) -> None:
        """Warn at most once a minute, without the message: a forger must not write our log."""
        now = time.monotonic()
        with self._lock:
            quiet = now - self._warned_at < _WARN_EVERY_S
            self._warned_at = self._warned_at if quiet else now
        if not quiet:
            _logger.warning("dropped a %s without the right seal: forged, or from a kit of another making", self._topic)
