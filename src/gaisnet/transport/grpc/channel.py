"""Connections over gRPC: certificates, names on the wire, and the options of both ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from gaisnet.errors import ConfigError
from gaisnet.transport.stream import Limits

SERVICE = "gaisnet.Link"
TALK, STATUS = "Talk", "Status"
SPEAKS_FOR = "gaisnet-speaks-for-bin"
BACKOFF_S = (0.2, 5.0)  # first and longest
_FRAME_SLACK_BYTES = 2**16


@dataclass(frozen=True)
class Certificates:
    """PEM files of one site.

    Attributes:
        root: Certificate of the network's authority.
        certificate: The site's own; its common name, and a subject alternative name, is the site's name.
        key: Private key of the certificate.
    """

    root: Path
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Read the three files. Raises ``ConfigError``."""
        return _read(self.root), _read(self.certificate), _read(self.key)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(f"certificate file '{file}'", found, "prepare the kit of this site again") from error


def said(error: Any) -> str:
    """Describe a failed call by status and details."""
    return f"{error.code().name}: {error.details()}"


def channel_credentials(certificates: Certificates) -> grpc.ChannelCredentials:
    """Return credentials for the dialing end. Raises ``ConfigError``."""
    root, certificate, key = certificates.read()
    return grpc.ssl_channel_credentials(root, key, certificate)


def options(limits: Limits) -> list[tuple[str, Any]]:
    """Return the options of both ends."""
    frame_bytes = limits.part_bytes + _FRAME_SLACK_BYTES
    keepalive_ms = round(limits.keepalive_s * 1000)
    return [
        ("grpc.max_send_message_length", frame_bytes),
        ("grpc.max_receive_message_length", frame_bytes),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", round(limits.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 2),
        # A compressed frame could grow to any size before its length is checked: it stays compressed, and is invalid.
        ("grpc.per_message_decompression", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
    ]


def options_of_dialer(listener: str, backoff_s: tuple[float, float] = BACKOFF_S) -> list[tuple[str, Any]]:
    """Return the options of the dialing end.

    Args:
        listener: Name that the other end's certificate must have.
        backoff_s: Least and most seconds between two attempts.
    """
    shortest, longest = (round(1000 * seconds) for seconds in backoff_s)
    return [
        ("grpc.ssl_target_name_override", listener),
        # Every connection is a new one, with our own back-off.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.initial_reconnect_backoff_ms", shortest),
        ("grpc.min_reconnect_backoff_ms", longest),
        # A proxy could not read the stream, and a web proxy from the environment may not know the site.
        ("grpc.enable_http_proxy", 0),
    ]
