"""The status of a listener, requested in a call of its own."""

import json
from typing import Any

import grpc
from pydantic import JsonValue

from gaisnet.errors import AskedTooOften, LinkLost, LinkTimeout, SiteRefused, WireFormatError
from gaisnet.transport.grpc.channel import (
    SERVICE,
    STATUS,
    Certificates,
    channel_credentials,
    options,
    options_of_dialer,
    said,
)
from gaisnet.transport.stream import DEFAULT_LIMITS


def ask_status(address: str, certificates: Certificates, listener: str, timeout_s: float) -> dict[str, JsonValue]:
    """Ask a listener for its status; any site of the network may.

    Args:
        address: ``host:port`` of the listener.
        certificates: This site's certificates.
        listener: Name that the listener's certificate must have.
        timeout_s: Seconds to wait.

    Raises:
        LinkTimeout: No answer in time.
        LinkLost: Nobody listens there, or it is not a site of that name and network.
        SiteRefused: The listener does not accept the call.
        AskedTooOften: This site has asked too often in a short time.
        ConfigError: The certificates cannot be read.
    """
    both = [*options(DEFAULT_LIMITS), *options_of_dialer(listener)]
    with grpc.secure_channel(address, channel_credentials(certificates), both) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/{STATUS}")
        try:
            answer = ask(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            raise _translated(error, listener, timeout_s) from error
    return _json_object(answer)


def _json_object(answer: bytes) -> dict[str, JsonValue]:
    try:
        status = json.loads(answer)
    except ValueError as error:
        raise WireFormatError("a status that is no JSON") from error
    if not isinstance(status, dict):
        raise WireFormatError("a status that is no JSON object")
    return status


def _translated(error: Any, listener: str, timeout_s: float) -> Exception:
    """Translate a failed unary call into an error of ours."""
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return LinkTimeout(f"the status of '{listener}'", f"no answer for {timeout_s:g} s")
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return SiteRefused(f"the status of '{listener}'", said(error))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return AskedTooOften(f"the status of '{listener}'", error.details())
    return LinkLost(listener, said(error))
