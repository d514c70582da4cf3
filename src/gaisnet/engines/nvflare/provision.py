"""Startup kits for every site of a network, made by NVFlare: one authority, one certificate per site, mutual TLS."""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

from nvflare.lighter.constants import CtxKey
from nvflare.lighter.entity import Project
from nvflare.lighter.impl.cert import CertBuilder
from nvflare.lighter.impl.signature import SignatureBuilder
from nvflare.lighter.impl.static_file import StaticFileBuilder
from nvflare.lighter.impl.workspace import WorkspaceBuilder
from nvflare.lighter.provisioner import Provisioner

from gaisnet.engines.nvflare.job_files import CLOUD_CLASS, EDGE_CLASS
from gaisnet.engines.nvflare.kit import LINK_FILE, ORGANIZATION, SEAL_BYTES, SEALS
from gaisnet.errors import OutputInUse, ProvisionFailed

ADMIN = "admin"
"""Key of the admin's kit in the result of ``provision``."""

_ROOT_VALID_DAYS = 3650
_CLOCKS_DIFFER = timedelta(days=1)
_HEART_BEAT_TIMEOUT_S = 30
_DEVICE_FILES = ("client.crt", "client.key", "rootCA.pem")
_AUTHORITY = "authority"
_RESERVED = (ADMIN, _AUTHORITY, "server")  # NVFlare calls its server so, whatever the site's name
_KEPT_SEALS = ".seals"  # no name that a network could have, whose folder is beside it
_SERVER_PARTS = "gaisnet.engines.nvflare.server_parts"
_EDGE_PARTS = "gaisnet.engines.nvflare.edge_parts"
_POLICY = {
    "format_version": "1.0",
    "permissions": {
        # A right that is not here is nobody's; those that are "none" are named for the reader. No category of rights is
        # granted whole: NVFlare counts the deletion of a job's folder at a site as managing a job.
        "project_admin": {
            **dict.fromkeys(("check_status", "list_jobs", "get_job_meta", "submit_job", "abort_job"), "any"),
            **dict.fromkeys(("byoc", "shell_commands", "download_job", "clone_job", "operate"), "none"),
        }
    },
}


_LOGGING = {
    # To the standard output alone, whose log the launcher keeps small: NVFlare's own files would take 880 MB per job.
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "()": "nvflare.fuel.utils.log_utils.BaseFormatter",
            "fmt": "%(asctime)s - %(name)s - %(levelname)s - %(fl_ctx)s - %(message)s",
        }
    },
    "handlers": {"output": {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stdout"}},
    "root": {"level": "INFO", "handlers": ["output"]},
}


@dataclass(frozen=True)
class SiteAddress:
    """The address of a site.

    Attributes:
        host: DNS name or IP address by which the others reach it.
        link_port: TCP port of the site's own listener.
    """

    host: str
    link_port: int


@dataclass(frozen=True)
class NetworkAddresses:
    """The sites of a network.

    Attributes:
        name: Name of the network: letters, digits, dashes.
        cloud: Name of the cloud's site: letters, digits, dashes.
        cloud_address: Where edges reach the cloud.
        nvflare_port: TCP port of NVFlare's server, on the cloud's host.
        edges: Address per edge name: letters, digits, dashes, underscores.
        devices: Names of the devices, unique in the network.
    """

    name: str
    cloud: str
    cloud_address: SiteAddress
    nvflare_port: int
    edges: Mapping[str, SiteAddress]
    devices: Sequence[str]

    @property
    def admin(self) -> str:
        """Name of the network's only administrator; NVFlare wants the form of an e-mail address."""
        return f"admin@{self.name}.example"


def provision(network: NetworkAddresses, out: Path) -> dict[str, Path]:
    """Make the kits ``out/SITE`` and ``out/admin``; a device's kit is three PEM files.

    ``out/authority`` holds the key of the certificate authority and every other key and seal: it stays with whoever
    prepares the network, and lets the same call renew or add kits later, after the old folders were moved away.

    Returns:
        Folder per site name, and that of the administrator under ``ADMIN``.

    Raises:
        OutputInUse: A kit's folder is there already.
        ProvisionFailed: NVFlare refused a name or could not write.
    """
    names = [network.cloud, *network.edges, *network.devices]
    _check_names(network, names)
    for name in [*names, ADMIN]:
        if (out / name).exists():
            raise OutputInUse(out / name, "is a site's kit already")
    authority = out / _AUTHORITY
    made = _build(network, authority)
    _protect(authority)
    kits = {name: out / name for name in [*names, ADMIN]}
    for name in [network.cloud, *network.edges]:
        (made / name).rename(kits[name])
    (made / network.admin).rename(kits[ADMIN])
    for device in network.devices:
        kits[device].mkdir()
        for file in _DEVICE_FILES:
            (made / device / "startup" / file).rename(kits[device] / file)
    shutil.rmtree(made)
    for kit in kits.values():
        kit.chmod(0o700)  # not the keys only: what a site learned will be in it too
    _settle_server(kits[network.cloud], network)
    for edge, address in network.edges.items():
        _settle_client(kits[edge], edge, address.link_port)
        _give_seal(_seal(authority, edge), edge, [kits[network.cloud], kits[edge]])
    return kits


def _check_names(network: NetworkAddresses, names: Sequence[str]) -> None:
    double = {name for name in names if names.count(name) > 1 or name in _RESERVED}
    if double:
        raise ProvisionFailed(network.name, f"site names that are not unique or reserved: {', '.join(sorted(double))}")


def _build(network: NetworkAddresses, authority: Path) -> Path:
    """Folder in which NVFlare left its kits."""
    builders = [
        WorkspaceBuilder(["master_template.yml"]),
        StaticFileBuilder(config_folder="config", scheme="tcp"),
        _CertificatesOfYesterday(root_valid_days=_ROOT_VALID_DAYS),
        SignatureBuilder(),
    ]
    notes = _Notes()
    try:
        _close_to_others(authority)
        # It prints the traceback of what it swallows.
        with redirect_stderr(StringIO()):
            context = Provisioner(str(authority), builders).provision(_project(network), logger=notes)
    except (ValueError, RuntimeError, OSError) as error:
        raise ProvisionFailed(network.name, f"NVFlare says: {error}") from error
    if context.get(CtxKey.BUILD_ERROR):
        raise ProvisionFailed(network.name, f"NVFlare says: {'; '.join(notes.errors)}")
    return Path(context[CtxKey.CURRENT_PROD_DIR])


def _project(network: NetworkAddresses) -> Project:
    project = Project(network.name, "", props={"api_version": 3, "connection_security": "mtls"})
    host, port = network.cloud_address.host, network.nvflare_port
    project.set_server(
        network.cloud,
        ORGANIZATION,
        {
            "fed_learn_port": port,
            "admin_port": port,
            "default_host": host,
            # The SAN of a server holds its hosts only, so that its site name must be one of them; the certificate of a
            # client holds its name.
            "host_names": list(dict.fromkeys([host, network.cloud, "localhost", "127.0.0.1"])),
        },
    )
    for client in [*network.edges, *network.devices]:
        project.add_client(client, ORGANIZATION, {})
    project.add_admin(network.admin, ORGANIZATION, {"role": "project_admin", "connect_to": host})
    return project


class _CertificatesOfYesterday(CertBuilder):  # type: ignore[misc]
    """Builds certificates that are valid since yesterday, because other hosts' clocks may be slow."""

    @staticmethod
    def _generate_cert(*args: Any, not_valid_before: datetime | None = None, **more: Any) -> Any:
        begin = (not_valid_before or datetime.now(UTC)) - _CLOCKS_DIFFER
        return CertBuilder._generate_cert(*args, not_valid_before=begin, **more)


class _Notes:
    """Takes NVFlare's messages, which it would print."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def debug(self, text: str) -> None:
        pass

    def info(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        pass

    def error(self, text: str) -> None:
        self.errors.append(text)


def _settle_server(kit: Path, network: NetworkAddresses) -> None:
    resources = _default_resources(kit, CLOUD_CLASS)
    resources["servers"][0]["heart_beat_timeout"] = _HEART_BEAT_TIMEOUT_S
    # By default every network of a host keeps its jobs in one folder under /tmp.
    resources["snapshot_persistor"]["args"]["storage"] = _storage("snapshots")
    for component in resources["components"]:
        if component["id"] == "job_store":
            component.update(_storage("."))
        elif component["id"] == "job_manager":
            component["args"]["uri_root"] = "jobs"
    rejoin = {"id": "rejoin", "path": f"{_SERVER_PARTS}.Rejoin", "args": {"edges": list(network.edges)}}
    resources["components"].append(rejoin)
    _settle(kit, resources, network.cloud, network.cloud_address.link_port)


def _storage(folder: str) -> dict[str, Any]:
    return {"path": f"{_SERVER_PARTS}.KitStorage", "args": {"folder": folder}}


def _settle_client(kit: Path, site: str, link_port: int) -> None:
    resources = _default_resources(kit, EDGE_CLASS)
    resources["app_validator"] = {"path": f"{_EDGE_PARTS}.OwnJobOnly", "args": {}}
    kept = [part for part in resources["components"] if part["id"] != "site_log_streamer"]  # a log stays on its host
    for component in kept:
        if component["id"] == "process_launcher":
            component["path"] = f"{_EDGE_PARTS}.NarrowedJobLauncher"
    _settle(kit, {**resources, "components": kept}, site, link_port)


def _default_resources(kit: Path, job_class: str) -> dict[str, Any]:
    """Return NVFlare's defaults, with one installed class that a job may name, so that a job carries no code."""
    resources: dict[str, Any] = json.loads((kit / "local" / "resources.json.default").read_text(encoding="utf-8"))
    return {**resources, "class_allow_list": [job_class]}


def _settle(kit: Path, resources: dict[str, Any], site: str, link_port: int) -> None:
    link = {"site": site, "link_port": link_port}
    local = {
        "resources.json": resources,
        "authorization.json": _POLICY,
        "log_config.json": _LOGGING,
        LINK_FILE.name: link,
    }
    for name, content in local.items():
        (kit / "local" / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (kit / "transfer").mkdir(exist_ok=True)


def _close_to_others(folder: Path) -> None:
    """Restrict a folder before anything is in it: NVFlare writes private keys that everyone may read."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _protect(authority: Path) -> None:
    """Restrict private keys to their owner, before the kits leave the folder that is closed to others."""
    for path in [*authority.rglob("*.key"), *authority.rglob("cert.json")]:
        os.chmod(path, 0o600)


def _seal(authority: Path, edge: str) -> str:
    """Return the edge's secret in hexadecimal: a new one, or an earlier call's, which other kits may hold."""
    kept = authority / _KEPT_SEALS / edge
    if not kept.exists():
        _write_secret(kept, secrets.token_hex(SEAL_BYTES))
    return kept.read_text(encoding="ascii")


def _give_seal(secret: str, edge: str, kits: Sequence[Path]) -> None:
    for kit in kits:
        _write_secret(kit / SEALS / edge, secret)


def _write_secret(file: Path, secret: str) -> None:
    file.parent.mkdir(mode=0o700, exist_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as opened:
        opened.write(secret)
