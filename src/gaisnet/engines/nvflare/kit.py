"""A site's startup kit, as that site's processes use it: ports, certificates, and how NVFlare starts.

A kit is a folder that NVFlare provisioned (``startup``, ``local``, ``transfer``); ``local/gaisnet.json`` is ours. Files
that NVFlare writes while it runs (logs, jobs) stay in the kit, which is its workspace. ``local/seals/EDGE`` is a secret
of the cloud and that edge: see ``seal``.

No torch and no NVFlare here: NVFlare's job processes, the command line and devices read kits too.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from gaisnet.errors import ConfigError, KitUnreadable

LINK_FILE = Path("local", "gaisnet.json")
SEALS = Path("local", "seals")
SEAL_BYTES = 32
AUDIT_FILE = "audit.log"
"""NVFlare's list, in a kit, of received commands."""

ORGANIZATION = "gaisnet"
ENVIRONMENT = {"PYTHONSAFEPATH": "1"}
"""Setting of NVFlare's processes: they and their jobs work in the kit, from which nothing may be imported."""

NARROWED = "gaisnet.engines.nvflare.narrowed"
"""Module that runs NVFlare's client with few commands."""

ORDERS = "orders/"
"""Prefix on the cloud's listener: ``orders/EDGE`` carries the cloud's requests; the edge itself dials as ``EDGE``."""


@dataclass(frozen=True)
class Kit:
    """The facts that a process needs about its site.

    Attributes:
        site: Name of the site.
        link_port: TCP port on which the site's resident process listens.
        root: PEM file of the certificate authority.
        certificate: PEM file of the site's own certificate; its SAN holds ``site``.
        key: PEM file of the private key.
    """

    site: str
    link_port: int
    root: Path
    certificate: Path
    key: Path


def read_kit(folder: Path) -> Kit:
    """Read the kit of a cloud or an edge. Raises ``KitUnreadable``."""
    try:
        declared = json.loads((folder / LINK_FILE).read_text(encoding="utf-8"))
        site, link_port = declared["site"], declared["link_port"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KitUnreadable(folder, f"'{LINK_FILE}' cannot be read ({error!r})") from error
    if not isinstance(site, str) or not isinstance(link_port, int):
        raise KitUnreadable(folder, f"'{LINK_FILE}' holds {declared}")
    startup = folder / "startup"
    # A server's kit has a certificate called server, every other kit one called client; both can listen and dial,
    # since NVFlare's certificates carry no limits of usage.
    role = "server" if (startup / "server.crt").is_file() else "client"
    kit = Kit(site, link_port, startup / "rootCA.pem", startup / f"{role}.crt", startup / f"{role}.key")
    for path in (kit.root, kit.certificate, kit.key):
        if not path.is_file():
            raise KitUnreadable(folder, f"'startup/{path.name}' is missing")
    return kit


def read_seal(folder: Path, edge: str) -> bytes:
    """Read the secret shared with ``edge``, or with the cloud. Raises ``KitUnreadable``."""
    try:
        secret = bytes.fromhex((folder / SEALS / edge).read_text(encoding="ascii"))
    except (OSError, ValueError):  # a UnicodeDecodeError would show what is in the file
        secret = b""
    if len(secret) != SEAL_BYTES:
        raise KitUnreadable(folder, f"'{SEALS / edge}' is missing, or is not {SEAL_BYTES} bytes in hexadecimal")
    return secret


def server_command(kit: Path) -> list[str]:
    """Return program and arguments that run NVFlare's server in the foreground.

    Raises ``ConfigError`` for a spaced path.
    """
    module = "nvflare.private.fed.app.server.server_train"
    return [*_python(module), "-m", _workspace(kit), "-s", "fed_server.json", *_set()]


def client_command(kit: Path, site: str) -> list[str]:
    """Return the same for NVFlare's client of ``site``."""
    modules = (NARROWED, "nvflare.private.fed.app.client.client_train")
    return [*_python(*modules), "-m", _workspace(kit), "-s", "fed_client.json", *_set(f"uid={site}")]


def _python(*modules: str) -> list[str]:
    """Return a command with the interpreter's own path, since NVFlare starts its job processes with it."""
    return [sys.executable, "-u", "-m", *modules]


def _workspace(kit: Path) -> str:
    """Return the path for NVFlare's job processes, in a command line that it splits without any quoting."""
    for path in (str(kit.resolve()), sys.executable):
        if shlex.quote(path) != path:
            raise ConfigError(f"path '{path}'", "NVFlare cannot start jobs from it", "use one of plain characters")
    return str(kit.resolve())


def _set(*more: str) -> list[str]:
    return ["--set", "secure_train=true", *more, f"org={ORGANIZATION}", "config_folder=config"]
