"""A site's kit: a folder with everything that one process of the network must know before it reaches the others.

Layout: ``site.yaml`` (this module), ``start.sh``; certificates, for cloud and edges within NVFlare's own startup kit
(``startup``, ``local``, ``transfer``); the cloud's also ``admin``, a device's also ``tokenizer``.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import Field, ValidationError

from gaisnet.checkpoint import writing
from gaisnet.config import Config, DeviceSettings, EdgeSettings
from gaisnet.config.hosts import address
from gaisnet.config.learning import Settings
from gaisnet.config.yaml_text import load_yaml
from gaisnet.errors import KitInUse, KitUnreadable, KitVersion, LockTaken
from gaisnet.locks import locked
from gaisnet.transport.grpc.channel import Certificates

SITE_FILE = "site.yaml"
SITE_LOCK = ".lock"
"""Lock of the process around the site's tier."""
START_LOCK = ".start.lock"
"""Lock of the process that starts and restarts that one."""
CLOUD: Final = "cloud"

Role = Literal["cloud", "edge", "device"]


KIT_VERSION: Literal[1] = 1
"""Format of kits; raised with every change that an older release would misread."""


class Site(Settings):
    """Contents of ``site.yaml``."""

    version: Literal[1] = Field(KIT_VERSION, description="Format of the kit.")
    role: Role = Field(description="What the site is.")
    name: str = Field(description="As in its certificate.")
    config: Config = Field(description="The run's; hosts and ports are those of the network as it was prepared.")

    @property
    def edge(self) -> EdgeSettings:
        """The edge itself, or the edge of the device."""
        return next(
            edge for edge in self.config.edges if self.name in (edge.name, *(device.name for device in edge.devices))
        )

    @property
    def device(self) -> DeviceSettings:
        """The device itself."""
        return next(device for device in self.edge.devices if device.name == self.name)

    @property
    def cloud_address(self) -> str:
        """Address of the cloud for edges, ``host:port``."""
        return address(self.config.cloud.host, self.config.cloud.link_port)

    @property
    def edge_address(self) -> str:
        """Address of the edge for its devices, ``host:port``."""
        return address(self.edge.host, self.edge.link_port)


def write_site(folder: Path, site: Site) -> None:
    """Put ``site.yaml`` into a kit."""
    text = yaml.safe_dump(site.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (folder / SITE_FILE).write_text(text, encoding="utf-8")


def read_site(folder: Path, role: Role | None = None) -> Site:
    """Read a kit. Raises ``KitUnreadable``, also for the kit of another role."""
    try:
        raw = load_yaml((folder / SITE_FILE).read_text(encoding="utf-8"))
        found = raw.get("version", 0) if isinstance(raw, dict) else KIT_VERSION  # the first releases wrote none
        if found != KIT_VERSION:
            raise KitVersion(folder, str(found)[:20], str(KIT_VERSION))
        site = Site.model_validate(raw)
    except FileNotFoundError as error:
        raise KitUnreadable(folder, f"it has no {SITE_FILE}") from error
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise KitUnreadable(folder, f"{SITE_FILE} cannot be read ({error})") from error
    names = {"cloud": [CLOUD], "edge": [edge.name for edge in site.config.edges]}
    known = names.get(site.role, [device.name for _, device in site.config.each_device()])
    if site.name not in known:
        raise KitUnreadable(folder, f"{SITE_FILE} is of {site.role} '{site.name}', which its config does not name")
    if role is not None and site.role != role:
        raise KitUnreadable(folder, f"it is that of the {site.role} '{site.name}', not of a {role}")
    return site


def certificates(folder: Path, role: Role) -> Certificates:
    """Return the PEM files of a kit."""
    if role == "device":
        return Certificates(folder / "rootCA.pem", folder / "client.crt", folder / "client.key")
    kind = "server" if role == "cloud" else "client"
    startup = folder / "startup"
    return Certificates(startup / "rootCA.pem", startup / f"{kind}.crt", startup / f"{kind}.key")


@contextmanager
def claimed(folder: Path, name: str = SITE_LOCK) -> Iterator[None]:
    """Claim the kit inside the context: two processes of one site would share its store, and its name on every link.

    Raises:
        KitInUse: Another process has it.
        OutputNotWritable: The lock's file cannot be written.
        NoLocks: The file system has none.
    """
    with ExitStack() as held:
        with writing(folder / name):
            try:
                held.enter_context(locked(folder / name))
            except LockTaken as error:
                raise KitInUse(folder, error.found, error.do) from error
        yield
