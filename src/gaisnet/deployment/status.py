"""What every site of a network is doing, asked of those that listen: cloud and edges; they know of their devices."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gaisnet.config import Config
from gaisnet.deployment.site import CLOUD, certificates, read_site
from gaisnet.errors import GaisnetError, WireFormatError
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.status import ask_status

_ASK_S = 5.0
Health = Literal["up", "away", "unreachable", "unknown"]


class _Link(BaseModel):
    """What is used of a ``LinkState``; a site's answer is checked like everything from a link."""

    connected: bool
    since_s: float
    life: str
    rejected_frames: int
    problem: str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    stage: str
    done: int
    total: int
    links: dict[str, _Link]
    job: str = ""


@dataclass(frozen=True)
class SiteState:
    """One site as it was found just now.

    ``up`` and ``unreachable`` are of sites that were asked, ``up`` and ``away`` of devices, by their edge; ``unknown``
    is a device whose edge could not be asked.
    """

    name: str
    role: str
    health: Health
    detail: str


def network_status(kit: Path) -> list[SiteState]:
    """The state of every site of the network that a kit of cloud or edge belongs to. Raises ``KitUnreadable``."""
    site = read_site(kit)
    config, own = site.config, certificates(kit, site.role)
    listeners = {CLOUD: site.cloud_address} | {e.name: f"{e.host}:{e.link_port}" for e in config.edges}
    with ThreadPoolExecutor(len(listeners)) as pool:
        answers = dict(zip(listeners, pool.map(lambda name: _ask(listeners[name], own, name), listeners), strict=True))
    states = [_listener(name, answer) for name, answer in answers.items()]
    return states + [state for edge in config.edges for state in _devices(config, edge.name, answers[edge.name])]


def _ask(address: str, own: Certificates, name: str) -> _Answer | GaisnetError:
    try:
        return _Answer.model_validate(ask_status(address, own, name, _ASK_S))
    except ValidationError as error:
        return WireFormatError(f"a status with {error.error_count()} wrong fields")
    except GaisnetError as error:
        return error


def _listener(name: str, answer: _Answer | GaisnetError) -> SiteState:
    role = "cloud" if name == CLOUD else "edge"
    if isinstance(answer, GaisnetError):
        return SiteState(name, role, "unreachable", str(answer))
    links = {other: link for other, link in answer.links.items() if other != name}
    away = [other for other, link in links.items() if not link.connected]
    told = [f"{answer.stage} {answer.done}/{answer.total}", *([f"NVFlare: {answer.job}"] if answer.job else [])]
    told += [f"no link to {', '.join(away)}"] if away else [f"all {len(links)} links stand"]
    return SiteState(name, role, "up", "; ".join(told))


def _devices(config: Config, edge: str, answer: _Answer | GaisnetError) -> list[SiteState]:
    names = [device.name for owner, device in config.each_device() if owner.name == edge]
    if isinstance(answer, GaisnetError):
        return [SiteState(name, "device", "unknown", f"its edge '{edge}' cannot be asked") for name in names]
    return [_device(name, edge, answer.links[name]) for name in names if name in answer.links]


def _device(name: str, edge: str, link: _Link) -> SiteState:
    since = f"for {link.since_s:.0f} s"
    rejected = f"; {link.rejected_frames} connections were closed for bad frames" if link.rejected_frames else ""
    if link.connected:
        return SiteState(name, "device", "up", f"linked to '{edge}' {since}{rejected}")
    why = f": {link.problem}" if link.problem else ""
    seen = f"away {since}" if link.life else "has not come yet"
    return SiteState(name, "device", "away", f"{seen}{why}{rejected}")
