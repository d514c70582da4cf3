"""The validity of a kit's certificates: a warning before they expire, an explanation afterwards.

Otherwise an expired certificate shows up as a failed handshake at the other end, which says neither whose nor why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from gaisnet.deployment.site import Role, certificates
from gaisnet.errors import CertificateInvalid, KitUnreadable

WARN_BEFORE = timedelta(days=30)


@dataclass(frozen=True)
class Validity:
    """The period in which both a site's certificate and that of its authority are valid, in UTC."""

    file: Path
    begin: datetime
    end: datetime

    def warning(self, now: datetime) -> str:
        """A sentence from ``WARN_BEFORE`` its end on; "" before."""
        left = self.end - now
        if left > WARN_BEFORE:
            return ""
        day = f"{self.end:%Y-%m-%d}"
        return f"certificate expires in {left.days} days, on {day}; make new kits with 'deploy prepare' before"


def check_validity(folder: Path, role: Role, now: datetime | None = None) -> Validity:
    """The validity of a kit's certificates.

    Args:
        folder: The kit.
        role: Role of the site.
        now: Time zone aware; None for this moment.

    Raises:
        CertificateInvalid: They have expired, or are not valid yet.
        KitUnreadable: They cannot be read.
    """
    moment = now or datetime.now(UTC)
    every = list(_validities(folder, role))
    begun, ends = max(every, key=lambda one: one.begin), min(every, key=lambda one: one.end)
    if moment < begun.begin:
        raise CertificateInvalid(begun.file, f"valid from {begun.begin:%Y-%m-%d %H:%M} UTC on", moment, expired=False)
    if moment > ends.end:
        raise CertificateInvalid(ends.file, f"expired on {ends.end:%Y-%m-%d %H:%M} UTC", moment, expired=True)
    return ends


def _validities(folder: Path, role: Role) -> Iterator[Validity]:
    files = certificates(folder, role)
    for file in (files.certificate, files.root):
        try:
            found = x509.load_pem_x509_certificate(file.read_bytes())
        except (OSError, ValueError) as error:
            raise KitUnreadable(folder, f"'{file.name}' cannot be read ({error})") from error
        yield Validity(file, found.not_valid_before_utc, found.not_valid_after_utc)
