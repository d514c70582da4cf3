"""Errors of sites and their processes."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from gaisnet.errors.runs import GaisnetError


class DeploymentError(GaisnetError):
    """The sites of a network cannot be prepared, started or ended."""


class ProvisionFailed(DeploymentError):
    """NVFlare made no startup kits."""

    def __init__(self, network: str, found: str) -> None:
        super().__init__(
            f"startup kits for network '{network}': {found}; check the names and addresses of the sites, and that the "
            "output folder is writable"
        )


class KitUnreadable(DeploymentError):
    """A folder is not a site's kit, or a file of it is missing or damaged."""

    def __init__(self, folder: Path, found: str) -> None:
        super().__init__(f"site kit '{folder}': {found}; copy the kit again, or make new ones with 'deploy prepare'")


class KitVersion(KitUnreadable):
    """A kit was made in another format."""

    def __init__(self, folder: Path, found: str, supported: str) -> None:
        DeploymentError.__init__(
            self,
            f"site kit '{folder}' is in format {found}, and this release reads format {supported}; make new kits "
            "with 'gaisnet deploy prepare' of this release for every site, or install the release that made it "
            "(docs/compatibility.md)",
        )


class CertificateInvalid(DeploymentError):
    """A site's certificate, or its authority's, is not valid at this moment: no other site would let it in."""

    def __init__(self, file: Path, found: str, now: datetime, expired: bool) -> None:
        renew = "make new kits with 'deploy prepare' into a new folder, and give every site its own"
        do = renew if expired else "set this host's clock"
        super().__init__(f"certificate '{file}': {found}, and it is {now:%Y-%m-%d %H:%M} UTC on this host; {do}")


class KitInUse(DeploymentError):
    """Another process runs the site of a kit."""

    def __init__(self, folder: Path, found: str, do: str) -> None:
        super().__init__(f"site kit '{folder}': {found}; {do}")


class ProcessFailed(DeploymentError):
    """A process of the launch ends again and again, or cannot be started."""

    def __init__(self, name: str, found: str, log: Path, last_lines: str) -> None:
        super().__init__(f"process '{name}' {found}; its log is '{log}', which ends with:\n{last_lines}")


class ProcessesLeft(DeploymentError):
    """Processes of the launch are alive after SIGKILL."""

    def __init__(self, left: Iterable[int]) -> None:
        numbers = ", ".join(map(str, left))
        super().__init__(f"stopping the launch: processes {numbers} are still alive after SIGKILL; end them by hand")
