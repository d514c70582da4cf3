"""The status of every site of a network, asked of those that listen: cloud and edges, which know their devices."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gaisnet.config import Config
from gaisnet.config.hosts import address
from gaisnet.deployment.outcome import Outcome, read_outcome
from gaisnet.deployment.site import CLOUD, Site, certificates, read_site
from gaisnet.deployment.validity import check_validity
from gaisnet.errors import CertificateInvalid, GaisnetError, WireFormatError
from gaisnet.transport.grpc.channel import Certificates
from gaisnet.transport.grpc.status import ask_status

_ASK_S = 5.0
_LONGEST_NOTICE = 200
FAILED = 3
"""Exit code for a run that has failed."""

Health = Literal["up", "away", "unreachable", "unknown", "finished", "failed"]


class _Link(BaseModel):
    """The used part of a ``LinkState``; a site's reply is checked like everything from a link."""

    connected: bool
    since_s: float
    incarnation: str
    rejected_frames: int
    problem: str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore")

    stage: str
    done: int
    total: int
    links: dict[str, _Link]
    job: str = ""
    cycle: int = 0
    cycles: int = 0
    notice: str = Field("", max_length=_LONGEST_NOTICE)


@dataclass(frozen=True)
class SiteState:
    """One site as it was found just now.

    ``up`` and ``unreachable`` are of sites that were asked, ``up`` and ``away`` of devices, by their edge; ``unknown``
    is a device whose edge could not be asked. The kit's own site may also have ``finished`` or ``failed``: then no
    process of it is left, and its kit says so.
    """

    name: str
    role: str
    health: Health
    detail: str


def network_status(kit: Path) -> list[SiteState]:
    """Return the state of every site that a kit knows; a device knows its edge and itself. Raises ``KitUnreadable``."""
    site = read_site(kit)
    config, own = site.config, certificates(kit, site.role)
    listeners = {} if site.role == "device" else {CLOUD: site.cloud_address}
    listeners |= {edge.name: address(edge.host, edge.link_port) for edge in config.edges}
    answers = _ask_all(kit, site, listeners, own)
    outcome = read_outcome(kit)
    states = [
        _ended(name, answer, outcome)
        if name == site.name and outcome and isinstance(answer, GaisnetError)
        else _listener(name, answer)
        for name, answer in answers.items()
    ]
    return states + [state for edge in config.edges for state in _devices(config, edge.name, answers[edge.name])]


def _ask_all(
    kit: Path, site: Site, listeners: Mapping[str, str], own: Certificates
) -> dict[str, _Answer | GaisnetError]:
    try:
        check_validity(kit, site.role)
    except CertificateInvalid as error:  # nobody would answer, and their refusals would not say why
        return dict.fromkeys(listeners, error)
    with ThreadPoolExecutor(len(listeners)) as pool:
        asked = pool.map(lambda name: _ask(listeners[name], own, name), listeners)
        return dict(zip(listeners, asked, strict=True))


def exit_code(states: Sequence[SiteState]) -> int:
    """Return 0 if all sites are up or the cloud has finished, ``FAILED`` if the run has failed, 1 otherwise."""
    found = {state.health for state in states}
    if "failed" in found:
        return FAILED
    return 0 if found <= {"up"} or "finished" in found else 1


def _ask(address: str, own: Certificates, name: str) -> _Answer | GaisnetError:
    try:
        return _Answer.model_validate(ask_status(address, own, name, _ASK_S))
    except ValidationError as error:
        return WireFormatError(f"a status with {error.error_count()} wrong fields")
    except GaisnetError as error:
        return error


def _ended(name: str, answer: GaisnetError, outcome: Outcome) -> SiteState:
    """Return the state of a site that does not answer, from its kit."""
    role = "cloud" if name == CLOUD else "edge"
    since = f"{datetime.fromtimestamp(outcome.since, UTC):%Y-%m-%d %H:%M} UTC"
    if outcome.stage == "finished":
        return SiteState(name, role, "finished", f"at {since}; its output is in {outcome.output}")
    if outcome.stage == "failed":
        return SiteState(name, role, "failed", f"at {since}: {outcome.reason}")
    how = "was stopped" if outcome.stage == "stopped" else "was started"
    ended = "" if outcome.stage == "stopped" else " and did not end in order"
    return SiteState(name, role, "unreachable", f"{how} at {since}{ended}; {answer}")


def _listener(name: str, answer: _Answer | GaisnetError) -> SiteState:
    role = "cloud" if name == CLOUD else "edge"
    if isinstance(answer, GaisnetError):
        return SiteState(name, role, "unreachable", str(answer))
    links = {other: link for other, link in answer.links.items() if other != name}
    away = [other for other, link in links.items() if not link.connected]
    cycle = f"cycle {answer.cycle} of {answer.cycles}, " if answer.cycles else ""
    told = [f"{cycle}{answer.stage} {answer.done}/{answer.total}"]
    told += [said for said in (f"NVFlare: {answer.job}" if answer.job else "", answer.notice) if said]
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
    seen = f"away {since}" if link.incarnation else "has not come yet"
    return SiteState(name, "device", "away", f"{seen}{why}{rejected}")
