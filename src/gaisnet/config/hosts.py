"""Hosts in a configuration: checked where they are read, and formatted with a port for links."""

import re
from ipaddress import IPv6Address, ip_address
from typing import Annotated

from pydantic import AfterValidator

_LONGEST = 253
_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")


def address(host: str, port: int) -> str:
    """Return ``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"


def every_address(host: str, port: int) -> str:
    """Return the address to listen on so that ``host`` is reached at any of this machine's addresses."""
    return f"[::]:{port}" if is_ipv6(host) else f"0.0.0.0:{port}"


def is_ipv6(host: str) -> bool:
    """Return whether a checked host is an IPv6 address."""
    return ":" in host


def _checked(text: str) -> str:
    """Return the host without brackets. Raises ``ValueError`` with what was found and what to write."""
    if "://" in text:
        inner = text.split("://", 1)[1].split("/", 1)[0] or "cloud.example.org"
        name = inner if inner.endswith("]") else inner.rsplit(":", 1)[0]
        raise ValueError(f"'{text}' is a URL, not a host; write the host alone, such as '{name}'")
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = ip_address(host)
    except ValueError:
        return _checked_name(text)
    if found.is_unspecified or found.is_multicast:
        raise ValueError(f"'{text}' is no address of one host; write the one by which others reach it")
    if isinstance(found, IPv6Address) and found.scope_id is not None:
        raise ValueError(f"'{text}' means another interface on every host; write an address without '%'")
    return host


def _checked_name(name: str) -> str:
    if not name.strip():
        raise ValueError("it is empty; write a DNS name or an IP address, or leave the key out for localhost")
    if name != name.strip():
        raise ValueError(f"'{name}' has blanks around it; write '{name.strip()}'")
    host, _, port = name.rpartition(":")
    if port.isdigit() and (host.endswith("]") or (host and ":" not in host)):
        raise ValueError(f"'{name}' has a port; write '{host}', and the port as link_port or nvflare_port")
    if not name.isascii():
        raise ValueError(f"'{name}' is not ASCII; write the name in the form that DNS has it, which begins with 'xn--'")
    labels = name.removesuffix(".").split(".")
    if len(name) > _LONGEST or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError(f"'{name}' is no DNS name and no IP address; write one that the other hosts can resolve")
    return name


Host = Annotated[str, AfterValidator(_checked)]
"""A DNS name or an IP address; brackets around an IPv6 address are taken off."""
