"""Error responses in OpenAI's format; internal errors are reported in general words only."""

import logging
from collections.abc import Mapping

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from gaisnet.errors import ContextFull, GaisnetError, ServiceFull, SessionRefused, UnknownModel

INVALID = "invalid_request_error"
GONE = 499  # in metrics: the client left
_RETRY_S = "1"
_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client left before its answer was ready."""


class BadRequest(Exception):
    """A request that cannot be served. ``param`` names the field, ``code`` is for programs."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Refusal(Exception):
    """An error response."""

    def __init__(
        self,
        status: int,
        kind: str,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def to_response(self) -> Response:
        """Return the response for a client."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal for ``error``: everything about the client's own request, nothing about the inside."""
    match error:
        case Refusal():
            return error
        case ClientGone() | ClientDisconnect():
            return Refusal(GONE, INVALID, "the client has left")
        case BadRequest():
            return Refusal(400, INVALID, str(error), error.code, error.param)
        case UnknownModel():
            return Refusal(404, INVALID, str(error), "model_not_found", "model")
        case ContextFull():
            return Refusal(400, INVALID, str(error), "context_length_exceeded")
        case SessionRefused():
            return Refusal(400, INVALID, str(error))
        case ServiceFull():
            return _later("there is no room for another answer now", "overloaded")
        case GaisnetError():
            return _later("the body that should write this answer cannot be had now", "unavailable")
    return Refusal(500, "server_error", "something went wrong in here; it is in the server's log", "internal_error")


def too_many(limit: int) -> Refusal:
    """Return the refusal of one answer more than allowed at once."""
    found = f"{limit} answers are under way and no more are allowed; try again when one has ended"
    return Refusal(429, "rate_limit_error", found, "rate_limit_exceeded", headers={"Retry-After": _RETRY_S})


def log_refusal(error: Exception) -> Refusal:
    """Return the refusal for ``error``; log it if it is our own fault."""
    refusal = refusal_of(error)
    if refusal.status == 500:
        _log.error("an answer failed", exc_info=error)
    elif refusal.status == 503:
        _log.warning("an answer failed: %s", error)
    return refusal


def _later(found: str, code: str) -> Refusal:
    return Refusal(503, "server_error", f"{found}; try again", code, headers={"Retry-After": _RETRY_S})
