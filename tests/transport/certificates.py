"""A certificate authority in a folder, and sites with certificates of it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gaisnet.transport.grpc.channel import Certificates


@dataclass
class Authority:
    """Signs certificates; two of them are two networks."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.name = _name("authority")
        basic = x509.BasicConstraints(ca=True, path_length=None)
        root = _builder(self.name, self.name, self.key).add_extension(basic, critical=True)
        self.root = self.folder / "root.pem"
        self.root.write_bytes(root.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def site(self, name: str) -> Certificates:
        """Files of a site, made when first asked for."""
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        if not key.exists():
            self._sign(name, certificate, key)
        return Certificates(self.root, certificate, key)

    def _sign(self, name: str, certificate: Path, key_file: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = x509.SubjectAlternativeName([x509.DNSName(name)])
        leaf = _builder(_name(name), self.name, key).add_extension(alternative, critical=False)
        certificate.write_bytes(leaf.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        pem, shape = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        key_file.write_bytes(key.private_bytes(pem, shape, serialization.NoEncryption()))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
